"""The arena's books: who finds which chunk, what goes for another, and that no two places share a byte, whatever the order of calls."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from hypothesis.strategies import binary, booleans, integers, sampled_from

from gpumem.filler.arena import Arena, ChunkSet, Place
from gpumem.filler.files import BLOCK


def load(arena: Arena, chunk: bytes, size: int = BLOCK, namespace: str = "") -> Place:
    """A chunk that is there and that nobody needs just now."""
    place = arena.make_room(size, 0)
    assert place is not None
    arena.publish(place, namespace, chunk)
    arena.release(place)
    return place


def test_the_least_recently_used_chunk_goes_for_another() -> None:
    arena = Arena(2 * BLOCK)
    load(arena, b"first")
    load(arena, b"second")
    assert arena.find("", b"first")
    load(arena, b"third")
    assert [bool(arena.find("", chunk)) for chunk in (b"first", b"second", b"third")] == [True, False, True]
    assert arena.used == 2 * BLOCK


def test_what_somebody_needs_stays() -> None:
    arena = Arena(2 * BLOCK)
    needed = load(arena, b"needed")
    arena.retain(needed)
    assert arena.make_room(2 * BLOCK, 0) is None
    assert arena.find("", b"needed") is needed
    arena.release(needed)
    assert arena.make_room(2 * BLOCK, 0) is not None


def test_what_was_never_verified_is_never_found() -> None:
    arena = Arena(2 * BLOCK)
    place = arena.make_room(100, 0)
    assert place is not None
    assert arena.find("", b"chunk") is None
    arena.release(place)
    assert arena.used == 0


def test_a_namespace_finds_its_own_chunks_and_the_operators() -> None:
    arena = Arena(4 * BLOCK)
    load(arena, b"public")
    own = load(arena, b"own", namespace="red")
    assert arena.find("red", b"own") is own
    assert arena.find("blue", b"own") is None
    assert arena.find("", b"own") is None
    assert arena.find("red", b"public") is not None


def test_a_pinned_set_keeps_its_chunks_until_it_is_removed() -> None:
    arena = Arena(2 * BLOCK)
    load(arena, b"a")
    load(arena, b"b")
    pinned = ChunkSet([("", b"a"), ("", b"missing")], 2 * BLOCK, True, [])
    arena.add_set(("", b"set"), pinned)
    load(arena, b"c")
    assert (arena.present(pinned.keys), arena.find("", b"b")) == (BLOCK, None)
    assert (arena.used, arena.idle) == (2 * BLOCK, BLOCK), "what is pinned does not go"
    assert arena.make_room(2 * BLOCK, 0) is None
    arena.add_set(("", b"set"), ChunkSet(pinned.keys, pinned.size, False, []))  # the same, no longer pinned
    load(arena, b"large", 2 * BLOCK)
    assert arena.present(pinned.keys) == 0
    assert arena.used == arena.idle == 2 * BLOCK
    assert arena.remove_set(("", b"set"))
    assert not arena.remove_set(("", b"set"))


class ArenaMachine(RuleBasedStateMachine):
    """Whatever is loaded, held, found and let go: no two places share a byte, and nothing is lost."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(64 * BLOCK)
        self.places: list[Place] = []  # held once or more

    @rule(target=held, size=integers(1, 20 * BLOCK), alignment=integers(0, 1 << 40), chunk=binary(min_size=1, max_size=1), known=booleans())
    def load(self, size: int, alignment: int, chunk: bytes, known: bool) -> Place | None:
        place = self.arena.make_room(size, alignment)
        if place is None:
            return None
        assert place.offset % BLOCK == alignment % BLOCK
        assert place.start <= place.offset < place.offset + size <= place.start + place.length
        if known:
            self.arena.publish(place, "", chunk)
        self.places.append(place)
        return place

    @rule(target=held, chunk=binary(min_size=1, max_size=1), namespace=sampled_from(["", "other"]))
    def find(self, chunk: bytes, namespace: str) -> Place | None:
        place = self.arena.find(namespace, chunk)
        if place is not None:
            self.arena.retain(place)
            self.places.append(place)
        return place

    @rule(place=consumes(held))
    def release(self, place: Place | None) -> None:
        if place is not None:
            self.arena.release(place)
            self.places.remove(place)

    @invariant()
    def books_agree(self) -> None:
        taken = {place.start: place for place in [*self.places, *self.arena._places.values()]}
        extents = sorted([(place.start, place.length) for place in taken.values()] + self.arena._free)
        at = 0
        for start, length in extents:
            assert start == at
            at += length
        assert at == self.arena.size
        free = sorted(self.arena._free)
        assert all(start + length < after for (start, length), (after, _) in itertools.pairwise(free))


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
