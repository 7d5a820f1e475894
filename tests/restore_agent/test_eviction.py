"""What leaves a rung for another snapshot: enough or nothing, no more than is needed, and never what somebody uses."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from restore_agent.snapshots.eviction import Candidate, evicted

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        digest=st.uuids().map(str),
        size=st.integers(0, 20),
        seconds=st.floats(0, 100),
        uses=st.floats(0, 10),
        held=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.digest,
)
NEEDED = st.integers(1, 100)
BELOW = st.one_of(st.just(math.inf), st.floats(0, 100))


def sizes(candidates: list[Candidate], digests: list[str]) -> list[int]:
    return [each.size for each in candidates if each.digest in digests]


@given(CANDIDATES, NEEDED, BELOW)
def test_enough_goes_or_nothing_and_nothing_that_is_held_or_worth_more(candidates: list[Candidate], needed: int, below: float) -> None:
    may = [each for each in candidates if not each.held and (2 * each.worth < below or below == math.inf)]
    going = evicted(candidates, needed, below)
    assert (going is None) == (sum(each.size for each in may) < needed)
    if going is not None:
        assert set(going) <= {each.digest for each in may}
        assert len(set(going)) == len(going)
        freed = sizes(candidates, going)
        assert sum(freed) >= needed
        assert all(sum(freed) - size < needed for size in freed), "each of them is needed"


@given(CANDIDATES, NEEDED, NEEDED, BELOW)
def test_who_needs_more_frees_no_less(candidates: list[Candidate], one: int, other: int, below: float) -> None:
    less, more = (evicted(candidates, needed, below) for needed in sorted((one, other)))
    if more is not None:
        assert less is not None
        assert sum(sizes(candidates, less)) <= sum(sizes(candidates, more))


@given(CANDIDATES, NEEDED)
def test_what_is_used_more_stays_where_it_stayed(candidates: list[Candidate], needed: int) -> None:
    """To be used more often is never a reason to go."""
    going = evicted(candidates, needed)
    for number, each in enumerate(candidates):
        if going is not None and each.digest not in going:
            again = evicted([*candidates[:number], replace(each, uses=each.uses + 5), *candidates[number + 1 :]], needed)
            assert again is not None
            assert each.digest not in again


@given(CANDIDATES, NEEDED)
def test_two_that_one_has_room_for_do_not_take_each_others_place_for_ever(candidates: list[Candidate], needed: int) -> None:
    for wanted in candidates:
        for gone in evicted([each for each in candidates if each is not wanted], needed, wanted.worth) or ():
            back = next(each for each in candidates if each.digest == gone)
            assert math.isinf(wanted.worth) or evicted([replace(wanted, held=False)], 1, back.worth) is None


@st.composite
def sharing(draw: st.DrawFn) -> tuple[list[Candidate], dict[frozenset[str], int]]:
    """Candidates, and what some of them share."""
    candidates = draw(CANDIDATES)
    if len(candidates) < 2:
        return candidates, {}
    owners = st.frozensets(st.sampled_from([each.digest for each in candidates]), min_size=2)
    return candidates, draw(st.dictionaries(owners, st.integers(1, 40), max_size=6))


def freed(candidates: list[Candidate], shared: dict[frozenset[str], int], going: set[str]) -> int:
    return sum(sizes(candidates, list(going))) + sum(size for owners, size in shared.items() if owners <= going)


@given(sharing(), NEEDED, BELOW)
def test_what_several_share_goes_with_all_of_them(
    found: tuple[list[Candidate], dict[frozenset[str], int]], needed: int, below: float
) -> None:
    candidates, shared = found
    may = {each.digest for each in candidates if not each.held}
    going = evicted(candidates, needed, below, shared)
    if going is None:
        assert freed(candidates, shared, may) < needed or below != math.inf
    else:
        assert set(going) <= may and len(set(going)) == len(going)
        assert freed(candidates, shared, set(going)) >= needed
        assert all(freed(candidates, shared, set(going) - {each}) < needed for each in going), "each of them is needed"


def test_two_that_share_all_go_together_and_neither_alone() -> None:
    one, other, third = (Candidate(name, 1, seconds=100.0, uses=1.0) for name in ("one", "other", "third"))
    both = {frozenset({"one", "other"}): 98}
    assert evicted([one, other], 50, shared=both) == ["one", "other"]
    assert evicted([one, other], 2, shared=both) == ["one", "other"]
    assert evicted([one, other], 1, shared=both) == ["one"]
    assert evicted([one, replace(other, held=True)], 50, shared=both) is None, "what stays keeps what it shares"
    assert evicted([one, replace(other, held=True), third], 2, shared=both) == ["one", "third"]
    large = Candidate("large", 60, seconds=100.0, uses=1.0)
    assert evicted([one, other, large], 50, shared=both) == ["large"], "each of the two frees its half, which is less"
    assert evicted([one, other, replace(large, uses=3.0)], 50, shared=both) == ["one", "other"]
    assert evicted([one, other], 50, 3.0, shared=both) is None, "for one that nobody waits for: each is worth 100/50"
    assert evicted([one, other], 50, 5.0, shared=both) == ["one", "other"]


def test_the_seconds_lost_for_each_byte_decide_and_the_first_of_equal_ones_goes() -> None:
    slow = Candidate("slow", 10, seconds=8.0, uses=1.0)
    often = Candidate("often", 10, seconds=1.0, uses=9.0)
    large = Candidate("large", 100, seconds=10.0, uses=1.0)
    assert evicted([slow, often, large], 1) == ["large"]
    assert evicted([slow, often], 1) == ["slow"]
    assert evicted([slow, often, large], 101) == ["large", "slow"]
    unknown = [Candidate(name, 5, 1.0, 0.0) for name in "ab"]
    assert evicted([*unknown, often], 5) == ["a"]
    assert evicted([*unknown, large], 20) == ["large"], "the small ones before it are not needed then"
    assert evicted(unknown, 1, below=0.0) is None
