"""page_fill.c: runs are cut at the ends of chunks, copied into a process, and pages of zeros are found."""

import errno
import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from restore_agent.pages.native import Filler, cut, zero_pages
from restore_agent.snapshots.page_runs import PAGE, PageRun, address_of

PID = 7  # in the image


def runs(*each: tuple[int, int]) -> object:
    return (PageRun * len(each))(*(PageRun(PID, address, pages * PAGE) for address, pages in each))


def test_no_piece_lies_in_two_chunks() -> None:
    pieces, lasts = cut(runs((0, 3), (1 << 30, 2)), [2 * PAGE, 5 * PAGE])
    assert sum(piece.length for piece in pieces) == 5 * PAGE
    first = pieces[: lasts[0]]
    assert sum(piece.length for piece in first) == 2 * PAGE, "those before the end of the first chunk"
    assert lasts[-1] == len(pieces)
    assert all(after.offset == before.offset + before.length for before, after in pairwise(pieces))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to write into another process's memory as the agent does")
def test_pieces_are_copied_to_where_they_belong() -> None:
    arena = bytearray(os.urandom(4 * PAGE))
    target = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = address_of(memoryview(target))
    pieces, _ = cut(runs((begin + 2 * PAGE, 2), (begin, 2)), [4 * PAGE])
    filler = Filler(address_of(memoryview(arena)), {PID: os.getpid()})
    assert filler.copy(pieces, threads=2) == 0
    assert target[:] == bytes(arena[2 * PAGE :] + arena[: 2 * PAGE])


def test_an_address_that_is_not_there_is_named() -> None:
    arena = bytearray(PAGE)
    pieces, _ = cut(runs((PAGE, 1)), [PAGE])
    filler = Filler(address_of(memoryview(arena)), {PID: os.getpid()})
    assert filler.copy(pieces, threads=1) != 0
    assert filler.failed_address == PAGE


def test_the_address_that_is_named_is_that_of_the_error() -> None:
    """Where two threads fail at once: one for its process, which there is not, the other for its address."""
    arena = bytearray(64 * PAGE)
    both = (PageRun * 64)(*(PageRun(PID + number % 2, (number + 1) * PAGE, PAGE) for number in range(64)))
    pieces, _ = cut(both, [64 * PAGE])
    for _ in range(200):
        filler = Filler(address_of(memoryview(arena)), {PID: 1 << 30, PID + 1: os.getpid()})
        expected = {0: errno.ESRCH, 1: errno.EFAULT}
        assert filler.copy(pieces, threads=4) == expected[(filler.failed_address // PAGE - 1) % 2]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to write into another process's memory as the agent does")
def test_many_threads_copy_what_a_file_has_into_two_targets_at_once() -> None:
    size = 1024 * PAGE
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(size))
        file.flush()
        arena = mmap.mmap(file.fileno(), size)
    targets = [mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]

    def copied(target: mmap.mmap) -> int:
        begin = address_of(memoryview(target))
        pieces, _ = cut(runs(*((begin + at * PAGE, 4) for at in reversed(range(0, 1024, 4)))), [size])
        return Filler(address_of(memoryview(arena)), {PID: os.getpid()}).copy(pieces, threads=4)

    with ThreadPoolExecutor(len(targets)) as pool:
        assert list(pool.map(copied, targets)) == [0, 0]
    backwards = b"".join(arena[at : at + 4 * PAGE] for at in reversed(range(0, size, 4 * PAGE)))
    assert [target[:] == backwards for target in targets] == [True, True]


def test_a_stopped_copy_says_that_it_was() -> None:
    arena, target = bytearray(PAGE), mmap.mmap(-1, PAGE)
    pieces, _ = cut(runs((address_of(memoryview(target)), 1)), [PAGE])
    filler = Filler(address_of(memoryview(arena)), {PID: os.getpid()})
    filler.stop()
    assert filler.stopped and filler.copy(pieces, threads=1) == errno.ECANCELED


def test_pages_of_zeros() -> None:
    memory = bytearray(4 * PAGE)
    memory[PAGE] = memory[3 * PAGE - 1] = 1
    assert list(zero_pages(memoryview(memory))) == [1, 0, 0, 1]
