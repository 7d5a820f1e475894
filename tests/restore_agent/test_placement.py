"""On which GPUs a suspended tree wakes, and how gpumem makes room for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumem.client.control import Control
from gpumem.hardware.memory import HOST
from restore_agent.drivers.weights import Weights
from restore_agent.sequences.placement import HEADROOM, NoGpuMemory, OtherLinks, choose_gpus, keep_order
from tests.worlds.pool import Pool

GIB, MIB = 1 << 30, 1 << 20
TWO = ("GPU-a", "GPU-b")


def free(**found: int) -> dict[str, int]:
    return {f"GPU-{name}": size for name, size in found.items()}


def test_it_wakes_where_it_was() -> None:
    assert choose_gpus({"GPU-a": GIB}, TWO, TWO, free(a=4 * GIB, b=100 * GIB), {}) == {"GPU-a": "GPU-a", "GPU-b": "GPU-b"}


def test_it_wakes_where_its_weights_are() -> None:
    assert choose_gpus({"GPU-a": GIB}, TWO, TWO, free(a=100 * GIB, b=4 * GIB), {"GPU-a": {"GPU-b"}}) == {"GPU-a": "GPU-b", "GPU-b": "GPU-a"}
    assert choose_gpus({"GPU-a": GIB}, TWO, TWO, free(a=100 * GIB, b=4 * GIB), {"GPU-a": {"GPU-a", "GPU-b"}})["GPU-a"] == "GPU-a", (
        "both: where it was"
    )


def test_it_goes_elsewhere_where_it_does_not_fit() -> None:
    assert choose_gpus({"GPU-a": GIB}, TWO, TWO, free(a=GIB, b=4 * GIB), {"GPU-a": {"GPU-a"}})["GPU-a"] == "GPU-b"


def test_among_strangers_it_takes_the_one_with_most_room() -> None:
    here = ("GPU-x", "GPU-y")
    assert choose_gpus({"GPU-a": GIB}, TWO, here, free(x=4 * GIB, y=8 * GIB), {}) == {"GPU-a": "GPU-y", "GPU-b": "GPU-x"}


def test_the_largest_chooses_first() -> None:
    pairs = choose_gpus({"GPU-a": GIB, "GPU-b": 40 * GIB}, TWO, TWO, free(a=50 * GIB, b=2 * GIB), {})
    assert pairs == {"GPU-a": "GPU-b", "GPU-b": "GPU-a"}


def test_headroom_is_kept() -> None:
    assert choose_gpus({"GPU-a": GIB}, ("GPU-a",), ("GPU-a",), free(a=GIB + HEADROOM), {}) == {"GPU-a": "GPU-a"}
    with pytest.raises(NoGpuMemory) as none:
        choose_gpus({"GPU-a": GIB}, ("GPU-a",), ("GPU-a",), free(a=GIB + HEADROOM - 1), {})
    assert none.value.lacking == {"GPU-a": 1}


def test_without_room_it_says_what_is_lacking_where() -> None:
    with pytest.raises(NoGpuMemory, match=r"1088 MiB of a GPU and 512 MiB are free at most; end a replica, or give the pool less") as none:
        choose_gpus({"GPU-a": GIB}, TWO, TWO, free(a=512 * MIB, b=256 * MIB), {"GPU-a": {"GPU-b"}})
    assert none.value.lacking == {"GPU-a": GIB + HEADROOM - 512 * MIB, "GPU-b": GIB + HEADROOM - 256 * MIB}


def test_in_a_pod_the_first_takes_the_place_of_the_first() -> None:
    """Wherever there is more room, and whichever it had: every process of the pod counts its GPUs in that order."""
    given = ("GPU-b", "GPU-c")
    needed = {"GPU-a": GIB, "GPU-b": GIB}
    assert keep_order(needed, TWO, given, free(a=90 * GIB, b=2 * GIB, c=90 * GIB)) == {"GPU-a": "GPU-b", "GPU-b": "GPU-c"}
    assert keep_order({"GPU-b": GIB}, TWO, given, free(b=0, c=2 * GIB)) == {"GPU-a": "GPU-b", "GPU-b": "GPU-c"}, (
        "one is used, both are paired"
    )


def test_in_a_pod_no_other_gpu_will_do() -> None:
    with pytest.raises(NoGpuMemory, match=r"needs 576 MiB more of GPU-b, which this pod was given; end what uses it") as none:
        keep_order({"GPU-a": GIB}, ("GPU-a",), ("GPU-b",), free(a=90 * GIB, b=512 * MIB))
    assert none.value.lacking == {"GPU-b": GIB + HEADROOM - 512 * MIB}
    with pytest.raises(NoGpuMemory):
        keep_order({"GPU-a": GIB}, ("GPU-a",), ("GPU-b",), free(b=90 * GIB), barred={"GPU-b"})


def test_in_a_pod_ranks_find_their_gpus_linked_as_before_or_not_at_all() -> None:
    links = {("GPU-a", "GPU-b"): "NV18", ("GPU-b", "GPU-c"): "NV18", ("GPU-c", "GPU-d"): "SYS"}
    needed = {"GPU-a": GIB, "GPU-b": GIB}
    room = free(b=2 * GIB, c=2 * GIB, d=2 * GIB)

    def link(one: str, other: str) -> str:
        return links.get((one, other), "")

    assert keep_order(needed, TWO, ("GPU-b", "GPU-c"), room, link=link) == {"GPU-a": "GPU-b", "GPU-b": "GPU-c"}
    with pytest.raises(OtherLinks, match=r"its GPUs reach each other by NV18, and those of this pod by SYS"):
        keep_order(needed, TWO, ("GPU-c", "GPU-d"), room, link=link)


def test_two_parts_do_not_share_a_gpu() -> None:
    """The second finds the room of the first one's GPU of no use: one GPU takes one other's place."""
    with pytest.raises(NoGpuMemory) as none:
        choose_gpus({"GPU-a": 2 * GIB, "GPU-b": GIB}, TWO, TWO, free(a=100 * GIB, b=MIB), {})
    assert set(none.value.lacking) == {"GPU-b"}


@st.composite
def nodes(draw: st.DrawFn) -> tuple[dict[str, int], list[str], list[str], dict[str, int], dict[str, set[str]]]:
    count = draw(st.integers(1, 8))
    names = [f"GPU-{number}" for number in range(2 * count)]
    before = draw(st.permutations(names))[:count]
    here = draw(st.permutations(names))[:count]
    used = draw(st.lists(st.sampled_from(before), unique=True))
    needed = {each: draw(st.integers(1, 16)) * GIB for each in used}
    roomy = {each: draw(st.integers(0, 32)) * GIB for each in here}
    return needed, before, here, roomy, {each: set(draw(st.lists(st.sampled_from(here)))) for each in used}


@given(nodes())
def test_every_gpu_is_paired_with_one_of_its_own(
    node: tuple[dict[str, int], list[str], list[str], dict[str, int], dict[str, set[str]]],
) -> None:
    needed, before, here, roomy, resident = node
    try:
        pairs = choose_gpus(needed, before, here, roomy, resident)
    except NoGpuMemory as none:
        assert none.lacking and all(size > 0 and each in here for each, size in none.lacking.items())
        # There is none at all: the most wanted would find their room on the freest.
        sizes, rooms = sorted(needed.values(), reverse=True), sorted((roomy[each] - HEADROOM for each in here), reverse=True)
        assert any(size > room for size, room in zip(sizes, rooms, strict=False))
        return
    assert sorted(pairs) == sorted(before)
    assert sorted(pairs.values()) == sorted(here)
    assert all(roomy[pairs[old]] >= size + HEADROOM for old, size in needed.items())


# Several GPUs of one engine, and how they reach each other

FOUR = ("GPU-0", "GPU-1", "GPU-2", "GPU-3")
ROOM = dict.fromkeys((*FOUR, "GPU-a", "GPU-b"), 80 * GIB)


def by(pairs: dict[str, str], others: str = "SYS") -> Callable[[str, str], str]:
    """Links: "0 1" → "NV18"; those that are not named are `others`."""
    named = {frozenset(f"GPU-{each}" for each in ends.split()): way for ends, way in pairs.items()}
    return lambda one, other: named.get(frozenset((one, other)), others)


def test_each_rank_s_weights_draw_it_to_where_they_are() -> None:
    pairs = choose_gpus({"GPU-0": GIB, "GPU-1": GIB}, FOUR, FOUR, ROOM, {"GPU-0": {"GPU-3"}, "GPU-1": {"GPU-2", "GPU-1"}})
    assert (pairs["GPU-0"], pairs["GPU-1"]) == ("GPU-3", "GPU-1")


def test_ranks_that_reach_each_other_by_nvlink_wake_on_such() -> None:
    """Two pairs are linked; the weights of one rank lie where the other cannot follow."""
    link = by({"0 1": "NV12", "2 3": "NV12"})
    pairs = choose_gpus({"GPU-0": GIB, "GPU-1": GIB}, FOUR, FOUR, ROOM, {"GPU-0": {"GPU-2"}, "GPU-1": {"GPU-1"}}, (), link)
    assert (pairs["GPU-0"], pairs["GPU-1"]) == ("GPU-2", "GPU-3"), "the one that chooses first gets what it likes, the other its partner"
    busy = ROOM | {"GPU-3": 0}
    pairs = choose_gpus({"GPU-0": GIB, "GPU-1": GIB}, FOUR, FOUR, busy, {"GPU-0": {"GPU-2"}}, (), link)
    assert (pairs["GPU-0"], pairs["GPU-1"]) == ("GPU-0", "GPU-1"), "what it likes has no partner with room"


def test_where_no_gpus_are_linked_alike_it_says_so_before_anything_is_begun() -> None:
    link = by({"a b": "NV18"}, others="PHB")
    with pytest.raises(OtherLinks, match=r"its 2 GPUs reach each other by NV18, and no 2 with room do here"):
        choose_gpus({"GPU-a": GIB, "GPU-b": GIB}, ("GPU-a", "GPU-b"), ("GPU-0", "GPU-1"), ROOM, {}, (), link)
    assert choose_gpus({"GPU-a": GIB}, ("GPU-a", "GPU-b"), ("GPU-0", "GPU-1"), ROOM, {}, (), link)["GPU-a"] == "GPU-0", (
        "alone it needs none"
    )


def test_links_that_were_not_known_at_the_dump_are_not_compared() -> None:
    link = by({"a b": ""}, others="PHB")
    pairs = choose_gpus({"GPU-a": GIB, "GPU-b": GIB}, ("GPU-a", "GPU-b"), ("GPU-0", "GPU-1"), ROOM, {}, (), link)
    assert set(pairs.values()) == {"GPU-0", "GPU-1"}


def test_without_room_for_all_it_is_room_that_lacks_whatever_the_links() -> None:
    link = by({"0 1": "NV12", "2 3": "NV12"})
    with pytest.raises(NoGpuMemory) as none:
        choose_gpus({"GPU-0": GIB, "GPU-1": GIB}, FOUR, FOUR, dict.fromkeys(FOUR, 0) | {"GPU-0": 80 * GIB}, {}, (), link)
    assert set(none.value.lacking) == {"GPU-1", "GPU-2", "GPU-3"}


# Room that gpumem makes


async def test_gpumem_gives_up_what_is_free_and_gets_it_back(tmp_path: Path) -> None:
    async with Pool(tmp_path / "gpumem.sock") as pool:
        weights = Weights(pool.socket)
        (whole,) = (device.wanted_bytes for device in (await pool.status()).devices)
        assert not await weights.make_room({HOST: whole + MIB}), "so much it does not hold"
        assert not await weights.make_room({"GPU-none": MIB})
        assert await weights.make_room({"GPU-none": MIB, HOST: 64 * MIB})
        assert await weights.make_room({HOST: 32 * MIB})
        (device,) = (await pool.status()).devices
        assert (device.wanted_bytes, device.free_bytes) == (whole - 96 * MIB, whole - 96 * MIB)
        await weights.return_room()
        await weights.return_room()
        (device,) = (await pool.status()).devices
        assert (device.wanted_bytes, device.free_bytes) == (whole, whole)


async def test_room_that_was_made_for_a_restore_that_was_given_up_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked goes in the moment in which gpumem gives it up."""
    reserve, asked = Control.reserve, asyncio.Event()

    async def slow(control: Control, device: str, size: int) -> None:
        await reserve(control, device, size)
        asked.set()
        await asyncio.sleep(0.1)

    monkeypatch.setattr(Control, "reserve", slow)
    async with Pool(tmp_path / "gpumem.sock") as pool:
        weights = Weights(pool.socket)
        (whole,) = (device.wanted_bytes for device in (await pool.status()).devices)
        making = asyncio.create_task(weights.make_room({HOST: 64 * MIB}))
        await asked.wait()
        making.cancel()
        await asyncio.wait([making])
        await weights.return_room()
        (device,) = (await pool.status()).devices
        assert making.cancelled() and device.wanted_bytes == whole


async def test_room_is_made_on_the_gpu_that_lacks_least(tmp_path: Path) -> None:
    assert not await Weights(tmp_path / "nothing.sock").make_room({HOST: MIB}), "where there is no gpumem there is no room"
    await Weights(tmp_path / "nothing.sock").return_room()


def test_a_barred_gpu_is_for_none_of_the_used_ones() -> None:
    free = {"a": 9 * MIB * 1024, "b": 2 * MIB * 1024}
    assert choose_gpus({"a": MIB}, ["a", "b"], ["a", "b"], free, {}, {"a"}) == {"a": "b", "b": "a"}
    with pytest.raises(NoGpuMemory):
        choose_gpus({"a": MIB}, ["a", "b"], ["a", "b"], free, {}, {"a", "b"})
