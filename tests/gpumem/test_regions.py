"""Regions: a layout that contradicts itself is refused, and who may use a private one."""

from __future__ import annotations

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.server.pool import Slab
from gpumem.server.regions import LARGEST_CHUNK, Chunks, Region, State, identify
from gpumem.wire.errors import Invalid

HASH = b"h" * 32


def layout(size: int, *sizes: int, digest: bytes = HASH) -> bytes:
    return pb.Layout(size=size, chunks=[pb.Chunk(hash=digest, size=each) for each in sizes]).SerializeToString(deterministic=True)


def region(*sizes: int, private: bool = False) -> Region:
    serialized = layout(sum(sizes) + 5, *sizes)
    slabs = [Slab(-1, 2 << 20), Slab(-1, 2 << 20)]
    return Region(identify(serialized), "red", "host", serialized, Chunks.parse(serialized), slabs, private, pinned=False)


def test_chunks_lie_one_behind_the_other() -> None:
    chunks = Chunks.parse(layout(100, 10, 20, 30))
    assert (chunks.sizes, chunks.offsets, chunks.hashes, chunks.size) == ((10, 20, 30), (0, 10, 30), (HASH,) * 3, 100)


@pytest.mark.parametrize(
    ("serialized", "what"),
    [
        (b"\xff\xff", "not a serialized Layout"),
        (layout(0), "layout.size"),
        (layout(29, 10, 20), "do not hold chunks of 30"),
        (layout(1 << 60), "layout.size"),
        (layout(100, 10, 0), "empty"),
        (layout(LARGEST_CHUNK + 1, LARGEST_CHUNK + 1), f"longer than {LARGEST_CHUNK}"),
        (layout(100, 10, digest=b"short"), "32 bytes"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(serialized: bytes, what: str) -> None:
    with pytest.raises(Invalid, match=what):
        Chunks.parse(serialized)


def test_the_id_names_content_and_layout() -> None:
    assert identify(layout(100, 10)) == identify(layout(100, 10))
    assert len({identify(layout(100, 10)), identify(layout(101, 10)), identify(layout(100, 10, digest=b"i" * 32))}) == 3


def test_a_private_region_opens_with_its_capability() -> None:
    public, private = region(10), region(10, private=True)
    assert public.opens_to("blue", b"")
    assert private.opens_to("blue", private.capability)
    assert not any(private.opens_to("blue", wrong) for wrong in (b"", private.capability[:-1], region(10, private=True).capability))


def test_what_was_filled_opens_to_its_namespace_and_what_was_written_does_not() -> None:
    """A fill is verified against the id; what a process wrote under an id of its choice is not."""
    filled, written = region(10, private=True), region(10, private=True)
    written.written = True
    assert filled.opens_to("red", b"") and not filled.opens_to("blue", b"") and not filled.opens_to("", b"")
    assert not written.opens_to("red", b"") and written.opens_to("red", written.capability)


def test_how_much_is_filled() -> None:
    found = region(10, 20, 30)
    found.filled = {0, 2}
    assert (found.filled_bytes, found.size) == (40, 4 << 20)
    found.state = State.SEALED
    assert found.filled_bytes == 65
