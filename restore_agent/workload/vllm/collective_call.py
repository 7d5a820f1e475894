"""How a sum or a gather between ranks is cut into calls of all_reduce.cu's kernel: arithmetic alone, the same on every rank."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple

MOST_RANKS, MOST_BLOCKS, THREADS = 8, 64, 512  # as in all_reduce.cu
HEADER = 128 + 2 * MOST_BLOCKS * MOST_RANKS * 4  # bytes at the start of each rank's memory
HALF = 16 << 20  # bytes of each of its two halves: the most that one call takes
PUSHED = 64 << 10  # bytes of a sum that each rank writes to all others, as in all_reduce.cu
LINES = 2 * MOST_RANKS * 2 * PUSHED  # bytes behind the halves, where it is written
VECTOR = 16  # bytes
KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}  # element types, by torch's names
_AT_ONCE = 256 << 10  # bytes of a sum that more than two ranks do without dividing it: vLLM's own threshold for eight


class Mode(enum.IntEnum):
    """As in all_reduce.cu."""

    SUM = 0
    SUM_IN_PARTS = 1
    GATHER = 2
    SUM_PUSHED = 3


class Call(NamedTuple):
    """One launch: `vectors` of 16 bytes, from the byte `offset` on; `pitch`: of a gather, how many there are of each rank."""

    mode: Mode
    kind: int
    offset: int
    vectors: int
    pitch: int
    blocks: int


def sums(size: int, kind: str, ranks: int) -> Iterator[Call]:
    """Of so many bytes; none: the kernel does not take them."""
    if kind not in KINDS or not size or size % VECTOR:
        return
    mode = Mode.SUM_PUSHED if size <= PUSHED else Mode.SUM if ranks == 2 or size <= _AT_ONCE else Mode.SUM_IN_PARTS
    for offset in range(0, size, HALF):
        yield _call(mode, KINDS[kind], offset, min(HALF, size - offset))


def gathers(size: int) -> Iterator[Call]:
    """Of so many bytes of each rank; none: the kernel does not take them."""
    if not size % VECTOR:
        for offset in range(0, size, HALF):
            yield _call(Mode.GATHER, 0, offset, min(HALF, size - offset), size // VECTOR)


def _call(mode: Mode, kind: int, offset: int, size: int, pitch: int = 0) -> Call:
    count = size // VECTOR
    return Call(mode, kind, offset, count, pitch, min(MOST_BLOCKS, -(-count // THREADS)))
