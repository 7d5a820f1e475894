"""Reading a file once: the same bytes through the page cache and around it, from any place in it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumem.filler import files
from gpumem.filler.files import BLOCK, File
from gpumem.wire.errors import Corrupt

SIZE = 16 * BLOCK + 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(os.urandom(SIZE))
    return made


@pytest.fixture
def file(path: Path) -> Iterator[File]:
    found = File.of(os.open(path, os.O_RDONLY))
    yield found
    found.close()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("offset", "size"), [(0, BLOCK), (137, 3 * BLOCK), (5 * BLOCK + 1, 10), (BLOCK - 1, 2), (SIZE - 1500, 1500)])
def test_the_bytes_are_the_files(path: Path, file: File, monkeypatch: pytest.MonkeyPatch, offset: int, size: int, cached: bool) -> None:
    monkeypatch.setattr(File, "_is_cached", lambda *_: cached)
    lead = offset % BLOCK
    memory = mmap.mmap(-1, -(-(lead + size) // BLOCK) * BLOCK)  # begins at a block, as reading around the cache needs it
    with memoryview(memory) as blocks, blocks[lead : lead + size] as target:
        file.read(offset, target, blocks)
        assert target == path.read_bytes()[offset : offset + size]
    memory.close()


def test_around_the_cache_all_of_it_is_read(path: Path, file: File) -> None:
    if file.around < 0:
        pytest.skip(f"the file system of {path} has no O_DIRECT")
    memory = mmap.mmap(-1, 4 * BLOCK)
    with memoryview(memory) as blocks, blocks[137 : 137 + 3 * BLOCK] as target:
        assert file._read_around(BLOCK + 137, target, blocks) == 3 * BLOCK
        assert target == path.read_bytes()[BLOCK + 137 : 4 * BLOCK + 137]
    memory.close()


@pytest.mark.parametrize(("offset", "size"), [(0, 10 * BLOCK), (137, 9 * BLOCK), (BLOCK - 1, 2), (5 * BLOCK, SIZE - 5 * BLOCK)])
def test_around_the_cache_to_where_blocks_lie_otherwise(
    path: Path, file: File, monkeypatch: pytest.MonkeyPatch, offset: int, size: int
) -> None:
    """In pieces of four blocks."""
    if file.around < 0:
        pytest.skip(f"the file system of {path} has no O_DIRECT")
    monkeypatch.setattr(files, "_BETWEEN", 4 * BLOCK)
    target = bytearray(size)
    assert file._copy_around(offset, memoryview(target)) == size
    assert target == path.read_bytes()[offset : offset + size]


def test_what_lies_otherwise_and_is_not_cached_is_read_around(path: Path, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    if file.around < 0:
        pytest.skip(f"the file system of {path} has no O_DIRECT")
    monkeypatch.setattr(File, "_is_cached", lambda *_: False)
    target = bytearray(SIZE - 7)
    with Path("/dev/null").open("rb") as nothing:
        monkeypatch.setattr(file, "fd", nothing.fileno())  # by way of the cache nothing comes
        file.read(7, memoryview(target), None)
        monkeypatch.undo()
    assert target == path.read_bytes()[7:]


def test_a_file_system_that_cannot_read_around_its_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "O_DIRECT", os.O_DIRECTORY)  # refused for a file, as O_DIRECT is there
    file = File.of(os.open(path, os.O_RDONLY))
    assert file.around == -1
    target = bytearray(100)
    file.read(7, memoryview(target), memoryview(bytearray(BLOCK)))
    assert target == path.read_bytes()[7:107]
    file.close()


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_ends_too_early_is_corrupt(file: File, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    monkeypatch.setattr(File, "_is_cached", lambda *_: cached)
    memory = mmap.mmap(-1, 2 * BLOCK)
    with memoryview(memory) as blocks, pytest.raises(Corrupt, match=f"ends {2 * BLOCK - 1000} bytes before"):
        file.read(16 * BLOCK, blocks, blocks)
    memory.close()


def test_both_its_descriptors_are_closed(path: Path) -> None:
    file = File.of(os.open(path, os.O_RDONLY))
    file.close()
    for fd in {file.fd, file.around} - {-1}:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
