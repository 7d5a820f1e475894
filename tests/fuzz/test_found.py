"""What fuzzing has found, each as small as it can be: what was an error of nobody's, or took memory by its length, is refused."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import tarfile
from collections.abc import Callable

import pytest
from zerowake_proto import gpumem_pb2, ttrpc_pb2

from restore_agent.kubernetes import ttrpc
from restore_agent.pages import images
from restore_agent.snapshots.page_runs import PAGE, PageRun
from tests.fuzz import agent, pods
from tests.fuzz.parser import check, little_memory
from tests.fuzz.parsers import PARSERS

DEEP = b"[" * 100_000
WRAPS = b"".join(map(bytes, (PageRun(7, (1 << 64) - PAGE, 3 * PAGE),)))


def changed(*path: str | int, to: object) -> bytes:
    """A manifest with another value there."""
    found = json.loads(PARSERS["manifest"].samples[0])
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return json.dumps(found).encode()


def image(**files: bytes) -> bytes:
    return agent._packed(agent._IMAGES | {name.replace("_", "-") + ".img": content for name, content in files.items()})


def framed(magic: int, *messages: bytes) -> bytes:
    return struct.pack("<II", images._COMMON, magic) + b"".join(len(each).to_bytes(4, "little") + each for each in messages)


def tar(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Of one entry, which says that it has so many bytes, and has none."""
    entry = tarfile.TarInfo("a")
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def holes(listed: str) -> bytes:
    return agent._changes(("a", b"123", {"GNU.sparse.map": listed, "GNU.sparse.size": "9"}))


def layout(*chunks: gpumem_pb2.Chunk) -> bytes:
    return gpumem_pb2.Layout(size=1, chunks=chunks).SerializeToString()


REFUSED: dict[str, tuple[str, bytes]] = {
    "a manifest that is nested too deeply": ("manifest", DEEP),
    "a size that no protocol has a number for": ("manifest", changed("files", "changes.tar", "size", to=1 << 64)),
    "a file that is the snapshot's own folder": ("manifest", changed("files", ".", to={"size": 9, "hash": "ab" * 32})),
    "a file by a second name": ("manifest", changed("files", "images//core-7.img", to={"size": 9, "hash": "ab" * 32})),
    "weights that are the snapshot's own folder": ("manifest", changed("weights", 0, "parts", 0, "path", to="./")),
    "an offset beyond any file": ("manifest", changed("weights", 0, "parts", 0, "offset", to=1 << 63)),
    "a negative size of memory": ("manifest", changed("host_bytes", to=-1)),
    "bytes of a GPU that are none": ("manifest", changed("gpus", to={"GPU-1": 10**30})),
    "a layout that is no message": ("layout", b"\x12\xff"),
    "a chunk whose hash is a word": ("layout", layout(gpumem_pb2.Chunk(hash=b"..", size=1), gpumem_pb2.Chunk(hash=bytes(32), size=1))),
    "a chunk of exabytes": ("layout", layout(*(gpumem_pb2.Chunk(hash=bytes(32), size=1 << 63) for _ in range(2)))),
    "pages whose end wraps around": ("page-index", WRAPS),
    "an index that is torn": ("page-index", agent._INDEX + b"\0"),
    "a pax header that says it is exabytes": ("changes", tar(1 << 62, tarfile.XHDTYPE)),
    "an archive that was packed": ("changes", gzip.compress(agent._changes(("a", b"1", {})))),
    "holes that are no numbers": ("changes", holes("0,x")),
    "holes without an end": ("changes", holes("0,1,2")),
    "an index of weights that is nested too deeply": ("safetensors-index", DEEP),
    "an index that names its own folder": ("safetensors-index", b'{"weight_map": {"a": ""}}'),
    "a header that is nested too deeply": ("safetensors", struct.pack("<Q", len(DEEP)) + DEEP),
    "a review that is no UTF-8": ("admission", b'{"request": {"uid": "u", "object": {"\xff": 1}}}'),
    "a review that is nested too deeply": ("admission", b'{"request": {"uid": "u", "object": {"a": ' + DEEP),
    "an answer of Prometheus that is nested too deeply": ("prometheus", DEEP),
    "a number of requests that no float can be": (
        "engine-metrics",
        b"vllm:num_requests_waiting 1\nvllm:num_requests_running " + b"9" * 400,
    ),
    "a time that no float can be": (
        "engine-metrics",
        b"vllm:num_requests_waiting 1 " + b"9" * 400 + b"\nvllm:num_requests_running 1",
    ),
}
READ: dict[str, tuple[str, bytes]] = {
    "a record that is nested too deeply": ("records", DEEP),
    "demand that is nested too deeply": ("pushed-demand", DEEP),
    "annotations that are nested too deeply": ("pod", pods._pod(canary="[" * 9000, names="[" * 9000)),
    "a runtime of a version that is no number": ("nri", pods._call("Configure", pods._configure("containerd", "v" + "9" * 5000 + ".1"))),
    "an image without its message": ("criu-images", image(mm_7=framed(images._MM))),
    "a timer without a time": ("criu-images", image(files=framed(images.FILES, b"b\x04\x28\x010\x00"))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused(what: str) -> None:
    name, data = REFUSED[what]
    with little_memory(), pytest.raises(PARSERS[name].refuses):
        PARSERS[name].parse(data)


@pytest.mark.parametrize("what", READ)
def test_it_does_no_harm(what: str) -> None:
    name, data = READ[what]
    with little_memory():
        check(PARSERS[name], data)


@pytest.mark.parametrize(
    ("read", "files"),
    [
        (images.rights, {"core_7": framed(images._CORE, b"\xff")}),
        (images.process_ids, {"pstree": framed(images._PSTREE, b"")}),
        (images.mend_timers, {"files": framed(images.FILES, b"b\x04\x28\x010\x00")}),
        (lambda folder: list(images.split(folder)), {"mm_7": framed(images._MM)}),
        (lambda folder: list(images.skeletons(folder)), {"pagemap_7": framed(images._PAGEMAP)}),
    ],
)
def test_a_torn_image_is_called_so(read: Callable[[object], object], files: dict[str, bytes]) -> None:
    with agent._folder() as folder:
        for name, content in (agent._IMAGES | {f"{name.replace('_', '-')}.img": data for name, data in files.items()}).items():
            (folder / name).write_bytes(content)
        with pytest.raises(images.ImageError):
            read(folder)


async def test_a_runtime_has_two_connections() -> None:
    """What it says on any other would be kept for ever."""
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack(">II", 9, 4) + b"well")
    reader.feed_eof()
    connection = ttrpc.Connection(reader, pods._Nowhere(), lambda request: ttrpc_pb2.Response())  # type: ignore[arg-type]
    with pytest.raises(ttrpc.TtrpcError, match="of connection 9"):
        await connection.ended
