"""Runs of pages and their index on disk."""

import ctypes
from pathlib import Path

from restore_agent.snapshots.page_runs import PAGE, PageRun, Pages, address_of, read_index, write_index


def test_an_index_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "pages.index"
    written = [(7, 1 << 40, 3 * PAGE), (8, 0, PAGE)]
    write_index(path, (PageRun(*run) for run in written))
    assert path.stat().st_size == 2 * ctypes.sizeof(PageRun)
    assert [(run.pid, run.address, run.length) for run in read_index(path.read_bytes())] == written


def test_what_is_cut_short_is_no_run(tmp_path: Path) -> None:
    path = tmp_path / "pages.index"
    write_index(path, [PageRun(7, PAGE, PAGE)] * 2)
    assert len(read_index(path.read_bytes()[:-1])) == 1


def test_pages_know_their_length_and_memory_its_address() -> None:
    memory = bytearray(b"x" * PAGE)
    assert Pages(7, PAGE, memoryview(memory)).length == PAGE
    assert ctypes.string_at(address_of(memoryview(memory)), 2) == b"xx"
