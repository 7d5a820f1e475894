"""How sums and gathers are cut into calls: all of the bytes, once each, none larger than a half of the ranks' memory."""

from __future__ import annotations

import re

import pytest

from restore_agent.workload.vllm import collective_call
from restore_agent.workload.vllm.collective_call import HALF, HEADER, LINES, MOST_RANKS, PUSHED, Call, Mode, gathers, sums
from tests.worlds.collective_on_processor import KERNEL

KIB = 1 << 10


def cover(calls: list[Call], size: int) -> bool:
    ends = [0, *(call.offset + 16 * call.vectors for call in calls)]
    return [call.offset for call in calls] == ends[:-1] and ends[-1] == size and all(16 * call.vectors <= HALF for call in calls)


@pytest.mark.parametrize("size", [16, 8 * KIB, HALF, HALF + 16, 3 * HALF - 16])
def test_calls_cover_all_bytes(size: int) -> None:
    assert cover(list(sums(size, "bfloat16", 4)), size)
    assert cover(list(gathers(size)), size)
    assert {call.pitch for call in gathers(size)} == {size // 16}


def test_two_ranks_never_divide_a_sum_and_more_do_so_when_it_is_large() -> None:
    assert {call.mode for size in (PUSHED + 16, HALF) for call in sums(size, "float16", 2)} == {Mode.SUM}
    assert [next(sums(size, "float16", 4)).mode for size in (256 * KIB, 256 * KIB + 16)] == [Mode.SUM, Mode.SUM_IN_PARTS]
    assert {call.mode for call in sums(HALF + KIB, "float16", 4)} == {Mode.SUM_IN_PARTS}, "its last piece, too: ranks agree by the whole"


def test_what_is_small_is_written_to_all_others_at_once() -> None:
    assert [next(sums(size, "float16", ranks)).mode for size in (16, PUSHED) for ranks in (2, 8)] == [Mode.SUM_PUSHED] * 4
    assert LINES == 2 * MOST_RANKS * 2 * PUSHED, "of each half and rank, twice the bytes"


def test_what_the_kernel_does_not_take_is_none() -> None:
    assert not list(sums(8, "bfloat16", 2)) and not list(sums(24, "bfloat16", 2)) and not list(sums(0, "bfloat16", 2))
    assert not list(sums(KIB, "float8_e4m3fn", 2)) and not list(sums(KIB, "int32", 2))
    assert not list(gathers(24)) and not list(gathers(0))


def test_a_small_call_takes_one_block_and_none_takes_more_than_there_are_flags_for() -> None:
    blocks = [next(sums(size, "float32", 2)).blocks for size in (16, 8 * KIB, 8 * KIB + 16, HALF)]
    assert blocks == [1, 1, 2, collective_call.MOST_BLOCKS]


def test_the_kernel_has_the_same_numbers() -> None:
    said = dict(re.findall(r"^#define (\w+) (\d+)", KERNEL.read_text(), re.MULTILINE))
    assert {name: int(said[name]) for name in ("MOST_RANKS", "MOST_BLOCKS", "PUSHED")} == {
        name: getattr(collective_call, name) for name in ("MOST_RANKS", "MOST_BLOCKS", "PUSHED")
    }
    assert {mode.name: int(said[mode.name]) for mode in Mode} == {mode.name: mode.value for mode in Mode}
    assert [int(said[kind]) for kind in ("BF16", "FP16", "FP32")] == list(collective_call.KINDS.values())
    assert f"__launch_bounds__({collective_call.THREADS})" in KERNEL.read_text()
    assert HEADER % 16 == 0
