"""Parsers of gpumem: what engines send to its socket, and checkpoints."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from zerowake_proto import gpumem_pb2 as pb

from gpumem.checkpoint.safetensors import InvalidCheckpoint, _files, _header
from gpumem.server.regions import Chunks
from gpumem.wire import plain_messages
from gpumem.wire.errors import Invalid
from gpumem.wire.frames import Assembler, ProtocolViolation, packets
from restore_agent.kubernetes.engine_packages import table
from tests.fuzz.parser import Parser

_CHUNKS = [pb.Chunk(hash=bytes(32), size=1 << 20), pb.Chunk(hash=bytes([1] * 32), size=100)]
_LAYOUT = pb.Layout(size=(1 << 20) + 100, chunks=_CHUNKS, tensors=[pb.Tensor(name="a", dtype="BF16", shape=[2, 3], offset=0)], note=b"n")
_REQUESTS = (
    pb.Request(id=1, hello=pb.Hello(version=1, label="engine")),
    pb.Request(id=2, begin=pb.Begin(layout=_LAYOUT.SerializeToString(), id=bytes(32), device="host")),
    pb.Request(id=3, scratch=pb.Scratch(size=1 << 20, more=[1, 2], device="host")),
    pb.Request(id=4, fill=pb.Fill(layout=_LAYOUT.SerializeToString(), sources=[pb.Source(chunks=2)])),
)


def _receive(data: bytes) -> None:
    """Packets, each led by the number of its descriptors and its length."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assembler = Assembler(64)
    ours.setblocking(False)
    spilled = os.memfd_create("spilled", os.MFD_ALLOW_SEALING)
    os.write(spilled, data)
    if data[-1:] > b"\x80":
        import fcntl  # noqa: PLC0415

        fcntl.fcntl(spilled, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    try:
        while len(data) > 3:
            count, length = data[0] % 20, int.from_bytes(data[1:3], "little")
            socket.send_fds(theirs, [data[3 : 3 + length] or b"\0"], [spilled] * count)
            data = data[3 + length :]
            if (frame := assembler.receive(ours)) is not None:
                frame.close()
    finally:
        os.close(spilled)
        assembler.close()
        assert len(list(Path("/proc/self/fd").iterdir())) == before, "descriptors were left"
        ours.close()
        theirs.close()


def _packets() -> Iterator[bytes]:
    for each in _REQUESTS:
        ((head, _),) = packets(each.SerializeToString(), [])
        yield b"\0" + len(head).to_bytes(2, "little") + head
    one, two = struct.pack("<BxHI", 1, 2, 0), struct.pack("<BxHI", 3, 0, 0)
    yield b"\1" + len(one).to_bytes(2, "little") + one + b"\1" + len(two).to_bytes(2, "little") + two
    spilled = struct.pack("<BxHI", 2, 1, 0)
    yield b"\2" + len(spilled).to_bytes(2, "little") + spilled + b"\xff"


def _read_layout(data: bytes) -> None:
    chunks = Chunks.parse(data)
    assert sum(chunks.sizes) <= chunks.size < 1 << 60


_PLAIN = plain_messages.defined(*table(pb.DESCRIPTOR))


def _read_plainly(data: bytes) -> None:
    """What protobuf takes, our own reader takes, and both find the same; where it differs it refuses."""
    try:
        whole = pb.Request.FromString(data)
    except DecodeError:
        whole = None
    plain = _PLAIN["Request"].FromString(data)
    if whole is not None:
        assert plain.id == whole.id


def _read_header(data: bytes) -> None:
    path = Path(f"/dev/shm/fuzz-{os.getpid()}.safetensors")
    path.write_bytes(data)
    try:
        begin, end, tensors = _header(path)
        assert 8 <= begin <= end == len(data)
        assert all(tensor.offset <= end - begin for tensor in tensors)
    finally:
        path.unlink()


def _read_index(data: bytes) -> None:
    folder = Path(f"/dev/shm/fuzz-{os.getpid()}")
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_bytes(data)
    try:
        assert all(path.parent == folder for path in _files(folder)), "it names a file of another folder"
    finally:
        index.unlink()
        folder.rmdir()


def _checkpoint() -> bytes:
    header = {
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]},
    }
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


def parsers() -> Iterator[Parser]:
    yield Parser("gpumem-frames", tuple(_packets()), _receive, (ProtocolViolation, BlockingIOError, EOFError))
    yield Parser("gpumem-layout", (_LAYOUT.SerializeToString(),), _read_layout, (Invalid,))
    requests = tuple(each.SerializeToString() for each in _REQUESTS)
    yield Parser("gpumem-requests", requests, _read_plainly, (plain_messages.DecodeError,))
    yield Parser("safetensors", (_checkpoint(),), _read_header, (InvalidCheckpoint,))
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    yield Parser("safetensors-index", (index,), _read_index, (InvalidCheckpoint,))
