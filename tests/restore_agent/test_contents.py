"""What a snapshot is made of: every byte of it once, readable, and the same for what two snapshots share."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3
from zerowake_proto import gpumem_pb2

from restore_agent.snapshots.catalog import Corrupt, NotFound
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.manifest import PartRecord, WeightsRecord
from restore_agent.transfer.contents import InFile, held, in_files
from tests.worlds.travelling import CONTENT, HEADER, WEIGHTS, node, take


def test_pages_files_and_weights_are_all_there_and_are_what_their_hashes_say(tmp_path: Path) -> None:
    with node(tmp_path / "state") as store:
        snapshot = take(store, tmp_path / "model", CONTENT + CONTENT)
        objects = held(store, snapshot)
        for each in objects:
            memory = bytearray(each.chunk.size)
            each.read(memoryview(memory))
            assert blake3(memory).hexdigest() == each.chunk.hash
        sizes = {each.chunk.hash: each.chunk.size for each in objects}
        assert len(sizes) == len(objects)
        named = {chunk.hash for chunk in snapshot.chunks} | {record.hash for record in snapshot.manifest.files.values()}
        assert named <= sizes.keys()
        assert sum(size for chunk_hash, size in sizes.items() if chunk_hash not in named) == len(WEIGHTS)


def test_what_goes_as_it_is_read_is_said(tmp_path: Path) -> None:
    with node(tmp_path / "state") as store:
        snapshot = take(store, tmp_path / "model")
        first = held(store, snapshot)[0]
        store.remove("default", "small")
        with pytest.raises(NotFound, match="was removed or replaced meanwhile"):
            first.read(memoryview(bytearray(first.chunk.size)))


def test_chunks_of_weights_lie_behind_each_other_from_where_a_part_begins() -> None:
    layout = gpumem_pb2.Layout(chunks=[gpumem_pb2.Chunk(hash=bytes([number]) * 32, size=10 + number) for number in range(3)])
    parts = (PartRecord(path="a", offset=HEADER, first_chunk=0, chunks=2), PartRecord(path="b", offset=7, first_chunk=2, chunks=1))
    record = WeightsRecord(region="ab", size=33, parts=parts)
    found = list(in_files(record, layout.SerializeToString()))
    assert found == [
        InFile(Chunk("00" * 32, 10), "a", HEADER),
        InFile(Chunk("01" * 32, 11), "a", HEADER + 10),
        InFile(Chunk("02" * 32, 12), "b", 7),
    ]
    too_many = record.model_copy(update={"parts": (parts[0].model_copy(update={"chunks": 4}),)})
    with pytest.raises(Corrupt, match="their layout has 3 chunks, and a is said to have more"):
        list(in_files(too_many, layout.SerializeToString()))
