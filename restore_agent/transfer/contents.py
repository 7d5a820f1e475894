"""What a snapshot is made of, as objects of a store, and where each lies on this node.

All bytes are chunks by content there: the chunks of its pages, its small files whole, and the chunks of its weights' regions, which lie in
the model's files one behind the other. What two snapshots share is one object.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from google.protobuf.message import DecodeError
from zerowake_proto import gpumem_pb2

from gpumem.filler.files import File
from gpumem.wire.errors import Corrupt as Ends
from restore_agent.snapshots.catalog import Catalog, Corrupt, Snapshot
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.manifest import Manifest, WeightsRecord, layout_file
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.layout import LIMIT

_HASH_DIGITS = 64
_LARGEST = 64 << 20  # bytes of a chunk, as gpumem has it


@dataclass(frozen=True, slots=True)
class Held:
    """One object that this node has. `read` fills memory of its size, and blocks.

    Raises Corrupt: its bytes are others by now; NotFound: the snapshot was removed; OSError.
    """

    chunk: Chunk
    read: Callable[[memoryview], None]


@dataclass(frozen=True, slots=True)
class InFile:
    """A chunk of weights, and where it lies: in the file of that path within the model's folder, from that byte on."""

    chunk: Chunk
    path: str
    offset: int


def held(catalog: Catalog, snapshot: Snapshot) -> list[Held]:
    """Every object of a snapshot of this node, each once. Blocks. Raises Corrupt, NotFound."""
    found: dict[str, Held] = {}
    for chunk in snapshot.chunks:
        found.setdefault(chunk.hash, Held(chunk, functools.partial(catalog.read_chunk, snapshot, chunk)))
    for name, record in snapshot.manifest.files.items():
        chunk = Chunk(record.hash, record.size)
        found.setdefault(chunk.hash, Held(chunk, _file_reader(catalog, snapshot, name)))
    for region in catalog.regions(snapshot):
        for part in in_files(region.record, region.layout):
            found.setdefault(part.chunk.hash, Held(part.chunk, _part_reader(snapshot, region.folder / part.path, part)))
    return list(found.values())


def named(manifest: Manifest) -> list[Chunk]:
    """The objects that the manifest names itself; those of weights are named by their layouts."""
    return [*(Chunk(each.hash, each.size) for each in manifest.files.values()), *(Chunk(each.hash, each.size) for each in manifest.chunks)]


async def chunks_of(manifest: Manifest, fetch: Fetch) -> dict[Chunk, None]:
    """All objects of a snapshot, each once, also those that its layouts name, which are fetched: they are small files of it.

    Raises what `Fetch.bring` does; Corrupt: a layout and its record differ.
    """
    chunks = dict.fromkeys(named(manifest))
    for region in manifest.distinct_weights:
        layout = manifest.files.get(layout_file(region))
        if layout is None or layout.size > LIMIT:
            raise Corrupt(f"weights {region.region[:12]}: the snapshot has no layout of them, or one of more than {LIMIT} bytes")
        data = bytearray(layout.size)
        await fetch.bring(Chunk(layout.hash, layout.size), memoryview(data))
        chunks |= dict.fromkeys(part.chunk for part in in_files(region, bytes(data)))
    return chunks


def in_files(record: WeightsRecord, layout: bytes) -> Iterator[InFile]:
    """Every chunk of a region. Raises Corrupt: the layout and the record differ."""
    try:
        chunks = [Chunk(chunk.hash.hex(), chunk.size) for chunk in gpumem_pb2.Layout.FromString(layout).chunks]
    except DecodeError as error:
        raise Corrupt(f"weights {record.region[:12]}: their layout cannot be read: {error}") from None
    if any(len(chunk.hash) != _HASH_DIGITS or not 0 < chunk.size <= _LARGEST for chunk in chunks):
        raise Corrupt(f"weights {record.region[:12]}: their layout names a chunk that gpumem would not take; take the snapshot again")
    for part in record.parts:
        offset = part.offset
        if part.first_chunk + part.chunks > len(chunks):
            raise Corrupt(f"weights {record.region[:12]}: their layout has {len(chunks)} chunks, and {part.path} is said to have more")
        for chunk in chunks[part.first_chunk : part.first_chunk + part.chunks]:
            yield InFile(chunk, part.path, offset)
            offset += chunk.size


def _file_reader(catalog: Catalog, snapshot: Snapshot, name: str) -> Callable[[memoryview], None]:
    def read(target: memoryview) -> None:
        target[:] = catalog.read_file(snapshot, name, snapshot.manifest.files[name])

    return read


def _part_reader(snapshot: Snapshot, path: Path, part: InFile) -> Callable[[memoryview], None]:
    def read(target: memoryview) -> None:
        try:
            with closing(File.of(os.open(path, os.O_RDONLY | os.O_CLOEXEC))) as file:
                file.read(part.offset, target, None)
        except (FileNotFoundError, Ends) as error:
            raise Corrupt(f"snapshot {snapshot}: its weights in {path} cannot be read: {error}") from None
        if blake3(target).hexdigest() != part.chunk.hash:
            raise Corrupt(f"snapshot {snapshot}: its weights in {path} are others than it was taken with; bring those, or take it again")

    return read
