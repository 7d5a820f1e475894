"""Content of files: read once, and again as soon as the kernel says that something has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from restore_agent.snapshots import file_hashes
from restore_agent.snapshots.file_hashes import FileHashes

NODE = Path("/")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "library.so"
    path.write_bytes(os.urandom(10_000))
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order."""
    paths: list[Path] = []
    really = file_hashes._hash

    def hashed(path: Path, size: int, *, trusted: bool) -> str:
        paths.append(path)
        return really(path, size, trusted=trusted)

    monkeypatch.setattr(file_hashes, "_hash", hashed)
    return paths


def found(file: Path) -> tuple[int, str]:
    content = file.read_bytes()
    return len(content), blake3(content).hexdigest()


def test_a_file_is_read_once(file: Path, read: list[Path]) -> None:
    hashes = FileHashes()
    assert hashes.of(NODE, file) == hashes.of(NODE, file) == found(file)
    assert hashes.match(NODE, str(file), *found(file))
    assert read == [file]


def test_what_is_known_outlives_the_process_and_may_be_lost(file: Path, tmp_path: Path, read: list[Path]) -> None:
    kept = tmp_path / "node" / "files.json"
    first = FileHashes(kept)
    first.of(NODE, file)
    first.keep()
    assert FileHashes(kept).of(NODE, file) == found(file)
    assert read == [file]
    for content in (b"", b"{", b"[[1]]", b'[["a", "b", "c", "d", "e"]]', b"7"):
        kept.write_bytes(content)
        assert FileHashes(kept).of(NODE, file) == found(file)
    kept.unlink()
    assert FileHashes(kept).of(NODE, file) == found(file)
    assert len(read) == 7


def test_it_is_written_down_only_where_there_is_news(file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "node" / "files.json"
    hashes = FileHashes(kept)
    hashes.of(NODE, file)
    hashes.keep()
    before = kept.stat()
    hashes.of(NODE, file)
    hashes.keep()
    assert kept.stat() == before


def test_a_disk_that_refuses_keeps_nobody_from_knowing(file: Path, tmp_path: Path) -> None:
    (tmp_path / "node").touch()
    hashes = FileHashes(tmp_path / "node" / "files.json")
    assert hashes.of(NODE, file) == found(file)
    hashes.keep()


def test_whatever_was_done_to_a_file_it_is_read_again(file: Path, read: list[Path]) -> None:
    hashes = FileHashes()
    before = file.stat()
    was = hashes.of(NODE, file)
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not hashes.match(NODE, str(file), *was)
    assert hashes.of(NODE, file) == found(file) != was
    twin = file.with_name("twin")
    twin.write_bytes(content)
    twin.replace(file)
    assert hashes.of(NODE, file) == found(file)
    assert len(read) == 3


def test_a_file_of_another_size_is_not_read(file: Path, read: list[Path]) -> None:
    assert not FileHashes().match(NODE, str(file), 9_999, found(file)[1])
    assert read == []


def test_a_container_s_files_are_known_by_their_path_in_it_and_are_nobody_else_s(file: Path, tmp_path: Path, read: list[Path]) -> None:
    hashes = FileHashes()
    for root in ("one", "other"):  # the same container, opened again: it has another path each time
        (tmp_path / root).symlink_to(tmp_path)
        assert hashes.of(tmp_path / root, "/library.so") == found(file)
    assert len(read) == 1
    hashes.of(NODE, file)
    assert len(read) == 2


def test_the_longest_unused_is_forgotten(tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "_KEPT", 2)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    hashes = FileHashes()
    for at in (0, 1, 0, 2, 0, 1):
        hashes.of(NODE, paths[at])
    assert [path.name for path in read] == ["a", "b", "c", "b"]
