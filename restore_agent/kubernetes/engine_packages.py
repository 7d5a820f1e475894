"""What runs inside engines, as Python packages in a folder of the node that is mounted into their containers: no image has to hold it.

    STATE/engine-packages/VERSION/   restore_agent.workload, gpumem's client and checkpoints, the messages of its socket

Its Python is whichever the image has (3.11 or later), and its libraries are the image's: there is nothing compiled here, and nothing that
an engine could have in another version. Of protobuf only the table of gpumem's messages is taken along (gpumem/wire/plain_messages.py).
What else the client imports it finds in the image where that is for engines that use it: torch, CUDA's bindings, which come with torch,
and blake3, which comes with vLLM, to publish weights.

A process that was captured with one version goes on with that one in every pod, however often the agent is upgraded: it may import of it
late. So each version has a folder of its own, named by its content; all are mounted, and they stay, 200 kB each.
"""

from __future__ import annotations

import hashlib
import pprint
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from zerowake_proto import gpumem_pb2

from zerowake_shared import durable
from zerowake_shared.pod_contract import ZEROWAKE_FOLDER

INSIDE = Path(ZEROWAKE_FOLDER) / "python"  # in the container
_WHOLE = ("gpumem.checkpoint", "gpumem.client", "gpumem.hardware", "gpumem.wire", "restore_agent.workload")
_MESSAGES = '''"""The messages of gpumem's socket, written by the restore agent; see gpumem/wire/plain_messages.py."""

from gpumem.wire.plain_messages import defined

globals().update(defined(
{messages},
{enums},
))
'''
_ENTRY_POINTS = ("vllm.platform_plugins", "sglang.srt.plugins")  # what engines look for


@dataclass(frozen=True)
class EnginePackages:
    """`folder`: on the node, to be mounted at INSIDE. `path`: inside, for PYTHONPATH."""

    folder: Path
    path: str


def lay_out(state: Path) -> EnginePackages:
    """This agent's version, put where it is not yet, or is not whole: a node that lost its power may have kept names of files alone.

    Raises OSError.
    """
    content = dict(_files())
    version = _version(content)
    folder = state / "engine-packages"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)  # a container's user may be anybody
    if not _is_whole(folder / version, content):
        fresh = folder / f".{secrets.token_hex(8)}"
        try:
            for name, data in content.items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                path.chmod(0o644)
            for path in (fresh, *(path for path in fresh.rglob("*") if path.is_dir())):
                path.chmod(0o755)
            durable.sync_tree(fresh)
            shutil.rmtree(folder / version, ignore_errors=True)
            fresh.rename(folder / version)
            durable.sync_folder(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return EnginePackages(folder, str(INSIDE / version))


def _is_whole(folder: Path, content: Mapping[str, bytes]) -> bool:
    return all(durable.content(folder / name) == data for name, data in content.items())


def _version(content: Mapping[str, bytes]) -> str:
    whole = hashlib.blake2b(digest_size=8)
    for name, data in sorted(content.items()):
        whole.update(f"{name}\0{len(data)}\0".encode() + data)
    return whole.hexdigest()


def _files() -> Iterator[tuple[str, bytes]]:
    """By their paths below the folder."""
    for package in _WHOLE:
        yield from _modules(files(package), package.replace(".", "/"))
    for above in sorted({package.partition(".")[0] for package in _WHOLE}):
        yield f"{above}/__init__.py", (files(above) / "__init__.py").read_bytes()
    yield "zerowake_proto/__init__.py", b""
    messages, enums = (pprint.pformat(part, width=140, sort_dicts=False) for part in table(gpumem_pb2.DESCRIPTOR))
    yield "zerowake_proto/gpumem_pb2.py", _MESSAGES.format(messages=messages, enums=enums).encode()
    # Plugins of engines are found by what is said of a distribution, as pip writes it.
    about = distribution("zerowake")
    described = f"zerowake-{about.version}.dist-info"
    yield f"{described}/METADATA", f"Metadata-Version: 2.1\nName: zerowake\nVersion: {about.version}\n".encode()
    points = ""
    for group in _ENTRY_POINTS:
        points += "".join([f"[{group}]\n", *(f"{point.name} = {point.value}\n" for point in about.entry_points if point.group == group)])
    yield f"{described}/entry_points.txt", points.encode()


def _modules(folder: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _modules(entry, f"{name}/{entry.name}")
        elif entry.name.endswith((".py", ".cu")):
            yield f"{name}/{entry.name}", entry.read_bytes()


def table(proto: FileDescriptor) -> tuple[dict[str, list[tuple[Any, ...]]], dict[str, dict[str, int]]]:
    """Messages and enums, as `plain_messages.defined` takes them."""
    messages: dict[str, list[tuple[Any, ...]]] = {}
    enums: dict[str, dict[str, int]] = {}

    def take(message: Descriptor) -> None:
        assert not message.nested_types, "plain_messages.py has no messages within messages"
        messages[message.name] = [_field(field) for field in message.fields]
        for enum in message.enum_types:
            enums[f"{message.name}.{enum.name}"] = {value.name: value.number for value in enum.values}

    for each in proto.message_types_by_name.values():
        take(each)
    for enum in proto.enum_types_by_name.values():
        enums[enum.name] = {value.name: value.number for value in enum.values}
    return messages, enums


def _field(field: FieldDescriptor) -> tuple[Any, ...]:
    kinds = {
        FieldDescriptor.TYPE_UINT64: "uint",
        FieldDescriptor.TYPE_UINT32: "uint",
        FieldDescriptor.TYPE_ENUM: "uint",
        FieldDescriptor.TYPE_BOOL: "bool",
        FieldDescriptor.TYPE_DOUBLE: "double",
        FieldDescriptor.TYPE_STRING: "string",
        FieldDescriptor.TYPE_BYTES: "bytes",
    }
    kind = field.message_type.name if field.message_type else kinds[field.type]
    group = field.containing_oneof.name if field.containing_oneof else ""
    return (field.number, field.name, kind, field.is_repeated, group)
