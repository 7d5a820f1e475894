"""What our protocols say on the wire, as plain values: what an older or a newer half of zerowake must go on finding there.

python -m tests.worlds.protocols     writes down what is new; nothing that is there already is changed by it
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

GOLDEN = Path(__file__).parents[1] / "shared" / "golden" / "protocols.json"
OURS = "agent", "gpumem", "peers"  # the others are somebody else's
_TYPES = {value: name.removeprefix("TYPE_").lower() for name, value in vars(FieldDescriptor).items() if name.startswith("TYPE_")}

Protocol = dict[str, dict[str, str]]
"""By message, enum or service: what each number, or method, is."""


def protocols() -> dict[str, Protocol]:
    """As they are now."""
    return {name: described(import_module(f"zerowake_proto.{name}_pb2").DESCRIPTOR) for name in OURS}


def described(file: FileDescriptor) -> Protocol:
    found: Protocol = {}
    for message in file.message_types_by_name.values():
        _message(message, found)
    for enum in file.enum_types_by_name.values():
        _enum(enum, found)
    for service in file.services_by_name.values():
        found[f"service {service.full_name}"] = {
            method.name: f"({_streamed(method.client_streaming, method.input_type)}) "
            f"→ ({_streamed(method.server_streaming, method.output_type)})"
            for method in service.methods
        }
    return found


def broken(before: dict[str, Protocol], now: dict[str, Protocol]) -> list[str]:
    """What an older half would not find again, or would find to be something else; each names the field."""
    lines = []
    for file, protocol in before.items():
        for owner, parts in protocol.items():
            for key, what in parts.items():
                found = now.get(file, {}).get(owner, {}).get(key, "")
                if found != what:
                    lines.append(f"{file}.proto: {owner}, {key}: was {what!r}, and {f'is {found!r}' if found else 'is gone'}")
    return lines


def merged(before: dict[str, Protocol], now: dict[str, Protocol]) -> dict[str, Protocol]:
    """What was before, and what is new."""
    whole: dict[str, Protocol] = {}
    for file, protocol in (now | before).items():
        whole[file] = {
            owner: {**now.get(file, {}).get(owner, {}), **before.get(file, {}).get(owner, {})}
            for owner in sorted({*protocol, *now.get(file, {})})
        }
    return whole


def _streamed(streams: bool, message: Descriptor) -> str:
    return f"stream {message.full_name}" if streams else str(message.full_name)


def _message(message: Descriptor, found: Protocol) -> None:
    found[f"message {message.full_name}"] = {str(field.number): _field(field) for field in message.fields}
    for nested in message.nested_types:
        _message(nested, found)
    for enum in message.enum_types:
        _enum(enum, found)


def _enum(enum: EnumDescriptor, found: Protocol) -> None:
    found[f"enum {enum.full_name}"] = {str(value.number): value.name for value in enum.values}


def _field(field: FieldDescriptor) -> str:
    of: Any = field.message_type or field.enum_type
    oneof = field.containing_oneof
    words = (
        "repeated" if field.is_repeated else "",
        of.full_name if of else _TYPES[field.type],
        field.name,
        f"in {oneof.name}" if oneof is not None and not oneof.name.startswith("_") else "",
    )
    return " ".join(word for word in words if word)


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    GOLDEN.write_text(json.dumps(merged(known, protocols()), indent=1, ensure_ascii=False, sort_keys=True) + "\n")
