"""A checkpoint directory as chunks and a layout, without a GPU and without torch.

A safetensors file is a header and then raw numbers, so nothing is converted or copied: a region is the files' numbers one behind the
other, and its chunks are found where they lie, in the files. Between two files the region must come back to a multiple of 16 bytes, which
is what vector loads want; as chunks know no gaps, a file's first chunk begins a few bytes early, in its header.

The header is read by hand: the safetensors library tells names and shapes, but not where in the file the numbers lie, which is all that a
fill needs. Rejected: chunks cut at tensors, which are thousands of tiny ones.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerowake_proto import gpumem_pb2

from gpumem.wire.sources import Source

CHUNK = 16 << 20  # bytes; copied to a GPU at 0.99 of the best rate, and 16 GiB are a thousand
_ALIGNMENT = 16  # bytes; the smallest header that names a tensor is longer
_WRITTEN_ALIGNMENT = 256  # bytes; what torch's own allocator promises kernels
PADDING = "padding."  # begins the names of what is only there to align the next, since the format allows no gaps
_LONGEST_HEADER = 100_000_000  # bytes, as the format has it
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READING = "reading.json"
_LOG = logging.getLogger(__name__)
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


class InvalidCheckpoint(Exception):
    """A directory does not hold a checkpoint that can be read; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a region of these weights holds, and where the bytes are."""

    layout: gpumem_pb2.Layout
    parts: tuple[Source, ...]  # all chunks of the layout, in order


def read_checkpoint(directory: Path) -> Checkpoint:
    """Reads and hashes every weight of a directory (or of one file), with all processors.

    Raises:
        InvalidCheckpoint: no safetensors there, or a file that is none.
        OSError: a file cannot be read.
        ImportError: it is called in an engine whose image is without blake3.
    """
    layout, parts = gpumem_pb2.Layout(), []
    pieces: list[tuple[Path, int, int]] = []
    for path in _files(directory):
        begin, end, tensors = _header(path)
        early = -layout.size % _ALIGNMENT
        first = len(pieces)
        pieces += [(path, at, min(CHUNK, end - at)) for at in range(begin - early, end, CHUNK)]
        parts.append(Source(path, begin - early, first, len(pieces) - first))
        for tensor in tensors:
            tensor.offset += layout.size + early
        layout.tensors.extend(tensors)
        layout.size += early + end - begin
    seen = Counter(tensor.name for tensor in layout.tensors)
    if seen and (most := seen.most_common(1)[0])[1] > 1:
        raise InvalidCheckpoint(f"{directory} has two tensors of the name {most[0]!r}; which files belong to the model?")
    _need_blake3()
    with ThreadPoolExecutor(os.cpu_count(), "hash") as pool:
        hashes = pool.map(_hash, *zip(*pieces, strict=True)) if pieces else ()
        layout.chunks.extend(gpumem_pb2.Chunk(hash=digest, size=piece[2]) for digest, piece in zip(hashes, pieces, strict=True))
    return Checkpoint(layout, tuple(parts))


def keep_reading(directory: Path, checkpoint: Checkpoint) -> None:
    """Writes what `read_checkpoint` found into a file beside the weights, for `kept_reading`. Raises OSError."""
    parts = [[part.path.name, *part[1:]] for part in checkpoint.parts]
    fresh = directory / f".{_READING}.{secrets.token_hex(4)}"  # several engines may publish the same weights at once
    try:
        fresh.write_text(json.dumps({"layout": checkpoint.layout.SerializeToString(deterministic=True).hex(), "parts": parts}))
        fresh.rename(directory / _READING)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def kept_reading(directory: Path) -> Checkpoint | None:
    """What `keep_reading` wrote; None: nothing, or what a crash has torn. Saves hashing it all again, and is safe: whoever fills a region
    compares the hashes. Raises OSError."""
    path = directory / _READING
    try:
        kept = json.loads(path.read_text())
        parts = tuple(Source(directory / name, *map(int, numbers)) for name, *numbers in kept["parts"])
        return Checkpoint(gpumem_pb2.Layout.FromString(bytes.fromhex(kept["layout"])), parts)
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception as error:  # also protobuf's own, which an engine's Python may not have to import
        _LOG.warning("%s cannot be read (%s): the weights beside it are read and hashed anew", path, error)
        return None


def write_checkpoint(
    directory: Path, tensors: Sequence[tuple[str, str, Sequence[int]]], content: Callable[[str], Iterable[memoryview]]
) -> None:
    """Writes a directory of one file, in which each tensor (name, element type, shape) is aligned as kernels want it. It appears whole.

    Args:
        content: the bytes of a tensor, in as many pieces as it likes.

    Raises:
        OSError: no room; or the directory exists.
        ValueError: content of another length than the tensor has.
    """
    header: dict[str, object] = {}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, dtype, shape in tensors:
        if gap := -end % _WRITTEN_ALIGNMENT:
            header[f"{PADDING}{len(places)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        begin = end + gap
        end = begin + byte_size(gpumem_pb2.Tensor(dtype=dtype, shape=shape))
        places[name] = begin, end
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        fresh.chmod(0o755)
        with (fresh / _SINGLE).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            first = file.tell()
            for name, (begin, end) in places.items():
                file.write(bytes(first + begin - file.tell()))
                for piece in content(name):
                    file.write(piece)
                if (given := file.tell() - first - begin) != end - begin:
                    raise ValueError(f"tensor {name!r} has {end - begin} bytes, and {given} were given")
        fresh.rename(directory)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _files(directory: Path) -> list[Path]:
    if directory.is_file():
        return [directory]
    index = directory / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidCheckpoint(f"{index} is no index of a checkpoint ({error!r}): bring it again") from None
        if strange := [name for name in names if not isinstance(name, str) or not name or Path(name).name != name]:
            raise InvalidCheckpoint(
                f"{index} names {strange[0]!r}, which is no file beside it: bring an index whose files lie in its own folder"
            )
        return [directory / name for name in names]
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise InvalidCheckpoint(f"{directory} holds no *.safetensors; is it a checkpoint directory?")
    return found


def _header(path: Path) -> tuple[int, int, list[gpumem_pb2.Tensor]]:
    """Where the numbers begin and end in the file, and the tensors in order, with offsets from that begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise InvalidCheckpoint(
                f"{path} is no safetensors file, or is torn: its header cannot have {length} bytes; bring the file again"
            )
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = [_tensor(name, entry, size - 8 - length) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidCheckpoint(f"{path} is no safetensors file, or is torn: {error}; bring the file again") from None
    return 8 + length, size, sorted(tensors, key=lambda tensor: tensor.offset)


def _tensor(name: str, entry: dict[str, Any], size: int) -> gpumem_pb2.Tensor:
    begin, end = entry["data_offsets"]
    tensor = gpumem_pb2.Tensor(name=name, dtype=entry["dtype"], shape=entry["shape"], offset=begin)
    bits = BITS.get(tensor.dtype)
    if not 0 <= begin <= end <= size or (bits and byte_size(tensor) != end - begin):
        raise ValueError(f"tensor {name!r} is said to lie at bytes {begin} to {end} of {size}")
    return tensor


def byte_size(tensor: gpumem_pb2.Tensor) -> int:
    """Bytes of a tensor's numbers. Raises KeyError: an element type that is not known here."""
    count = 1
    for n in tensor.shape:
        count *= n
    return count * BITS[tensor.dtype] // 8


def _need_blake3() -> None:
    """All the rest is of use without it, to an engine whose checkpoint another has read. Raises ImportError."""
    try:
        import blake3  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError("weights are hashed with blake3, which is not installed here: pip install blake3") from error


def _hash(path: Path, offset: int, size: int) -> bytes:
    from blake3 import blake3  # noqa: PLC0415

    buffer = bytearray(size)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.preadv(fd, [buffer], offset) != size:
            raise InvalidCheckpoint(f"{path} became shorter while it was read: end whatever writes it, then read it again")
    finally:
        os.close(fd)
    return blake3(buffer).digest()
