"""Every page of a restored process compared with its image, while CRIU holds it: what was filled, what CRIU restored, what was left out.

Nothing of this runs in a restore: it takes longer than one. Tests and measurements call it between the fill and CRIU's letting go, once.
A page that was left out is zeros where it is there at all; one that is not there reads as zeros by definition. Where a thread has told the
kernel to keep the number of its processor (rseq), the kernel writes that number whenever it likes: these few bytes are not compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from restore_agent.pages.fill import Arena
from restore_agent.pages.images import Skeleton, kernel_written, skeletons
from restore_agent.pages.native import zero_pages
from restore_agent.snapshots.page_runs import PAGE, Pages

_STEP = 1 << 20  # bytes
_PRESENT = 1 << 63 | 1 << 62  # of a page in /proc/PID/pagemap: in memory, swapped


class Different(Exception):
    """A page of a restored process is not what the image says."""


@dataclass(frozen=True)
class Compared:
    """Numbers of pages."""

    filled: int
    kept: int  # that CRIU restored
    zeros: int  # left out of the image, and there


def compare(arena: Arena, images: Path, host_pids: Mapping[int, int]) -> Compared:
    """`images`: CRIU's, after the split. `host_pids`: pid in the image → pid on this host, of processes that do not run.

    Raises:
        Different: the first page that differs.
        OSError: a process is not there.
    """
    found = {skeleton.pid: skeleton for skeleton in skeletons(images)}
    runs = arena.runs()
    written = kernel_written(images)
    filled = kept = zeros = 0
    for pid, skeleton in found.items():
        ours = [run for run in runs if run.pid == pid]
        mem = os.open(f"/proc/{host_pids[pid]}/mem", os.O_RDONLY)
        try:
            filled += sum(_compare(mem, run, written, "that was filled") for run in ours)
            kept += sum(_compare(mem, run, written, "that CRIU restored") for run in skeleton.kept)
            zeros += _compare_left_out(mem, host_pids[pid], skeleton, ours)
        finally:
            os.close(mem)
    if missing := {run.pid for run in runs} - found.keys():
        raise Different(f"the image has pages of pid {sorted(missing)} and no process of that number")
    return Compared(filled, kept, zeros)


def _compare(mem: int, run: Pages, written: list[range], which: str) -> int:
    for at in range(0, run.length, _STEP):
        expected = bytes(run.data[at : at + _STEP])
        got = bytearray(os.pread(mem, len(expected), run.address + at))
        for area in written:
            start, stop = (min(max(edge - run.address - at, 0), len(got)) for edge in (area.start, area.stop))
            got[start:stop] = expected[start:stop]
        if got != expected:
            page = next(i for i in range(0, len(expected), PAGE) if got[i : i + PAGE] != expected[i : i + PAGE])
            raise Different(f"the page of pid {run.pid} at {run.address + at + page:#x}, {which}, differs from the image")
    return run.length // PAGE


def _compare_left_out(mem: int, host_pid: int, skeleton: Skeleton, ours: list[Pages]) -> int:
    brought = sorted((run.address, run.address + run.length) for run in [*ours, *skeleton.kept])
    count = 0
    with Path(f"/proc/{host_pid}/pagemap").open("rb", buffering=0) as pagemap:
        for start, end in _gaps(skeleton.anonymous, brought):
            for at in range(start, end, _STEP):
                stop = min(end, at + _STEP)
                pagemap.seek(at // PAGE * 8)
                entries = memoryview(pagemap.read((stop - at) // PAGE * 8)).cast("Q")
                there = [i for i, entry in enumerate(entries) if entry & _PRESENT]
                if not there:
                    continue
                zeros = zero_pages(memoryview(bytearray(os.pread(mem, stop - at, at))))
                if wrong := [i for i in there if not zeros[i]]:
                    raise Different(f"the page of pid {skeleton.pid} at {at + wrong[0] * PAGE:#x} is not in the image and is not zeros")
                count += len(there)
    return count


def _gaps(ranges: list[tuple[int, int]], taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of sorted ranges is not taken; `taken` is sorted."""
    first = 0
    for at, end in ranges:
        while first < len(taken) and taken[first][1] <= at:
            first += 1
        gap = at  # where the next begins, if there is one
        for i in range(first, len(taken)):
            start, stop = taken[i]
            if start >= end:
                break
            if gap < start:
                yield gap, start
            gap = stop
        if gap < end:
            yield gap, end
