"""Compile caches as files of a snapshot: what goes in comes out, and an index that says anything else is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from restore_agent.snapshots import compile_caches
from restore_agent.snapshots.compile_caches import INDEX, PIECE, Cache, CacheFile, CacheIndex, InvalidCaches, contents, is_cache, keep


def file(path: str, size: int = 1, mode: int = 0o644) -> dict[str, object]:
    return {"path": path, "size": size, "mode": mode, "changed": 5}


def encoded(*files: dict[str, object], variable: str = "TRITON_CACHE_DIR") -> bytes:
    said = str({"version": 1, "caches": [{"variable": variable, "files": list(files)}]})
    return said.replace("'", '"').encode()


def test_what_is_kept_comes_out_again_with_mode_and_time(tmp_path: Path) -> None:
    folder, workspace = tmp_path / "cache", tmp_path / "workspace"
    (folder / "aa").mkdir(parents=True)
    workspace.mkdir()
    there = {"aa/large.so": os.urandom(PIECE + 7), "empty": b"", "run": b"#!"}
    for name, data in there.items():
        (folder / name).write_bytes(data)
    (folder / "run").chmod(0o755)
    os.utime(folder / "run", ns=(1, 1_700_000_000_123_456_789))
    (folder / "link").symlink_to("run")
    os.mkfifo(folder / "pipe")
    index, notes = keep(workspace, {"TRITON_CACHE_DIR": (folder, [*there, "link", "pipe", "gone", "aa"])})
    assert not notes and index == CacheIndex.decode((workspace / INDEX).read_bytes())
    assert sorted(path.name for path in (workspace / "caches").iterdir()) == ["000000", "000001", "index.json"]
    found = {file.path: (file, data) for _, file, data in contents(index, lambda name: (workspace / name).read_bytes())}
    assert {path: data for path, (_, data) in found.items()} == there
    assert (found["run"][0].mode, found["run"][0].changed) == (0o755, 1_700_000_000_123_456_789)
    assert all(is_cache(str(path.relative_to(workspace))) for path in (workspace / "caches").iterdir()) and not is_cache("images/x")


def test_where_nothing_was_compiled_nothing_is_kept(tmp_path: Path) -> None:
    index, notes = keep(tmp_path, {"TRITON_CACHE_DIR": (tmp_path / "none", [])})
    assert not index.caches and not notes and not list(tmp_path.iterdir())


def test_a_cache_that_is_too_large_is_named_and_the_others_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_caches, "MAX_FILES", 2)
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(name)
    found = {"CUDA_CACHE_PATH": (tmp_path, ["one", "two", "three"]), "TRITON_CACHE_DIR": (tmp_path, ["one"])}
    index, notes = keep(tmp_path, found)
    assert [cache.variable for cache in index.caches] == ["TRITON_CACHE_DIR"]
    assert len(notes) == 1 and "CUDA_CACHE_PATH" in notes[0] and "3 files" in notes[0]


@pytest.mark.parametrize(
    "files",
    [
        [file("../up")],
        [file("/etc/passwd")],
        [file("a/./b")],
        [file("a//b")],
        [file("")],
        [file("x" * 256)],
        [file("/".join("a" * 65))],
        [file("su", mode=0o4755)],
        [file("tmp", mode=0o1777)],
        [file("twice"), file("twice")],
        [file("a"), file("a/b")],
        [file("large", size=(256 << 20) + 1)],
        [file("a", size=200 << 20), file("b", size=200 << 20)],
        [file("less", size=-1)],
        [file("link") | {"target": "/etc/passwd"}],
    ],
)
def test_what_no_node_lays_out(files: list[dict[str, object]]) -> None:
    with pytest.raises(InvalidCaches, match=r"its compile caches are not laid out"):
        CacheIndex.decode(encoded(*files))


def test_more_files_than_there_may_be_are_refused() -> None:
    with pytest.raises(InvalidCaches, match=r"more than 20000 files"):
        CacheIndex.decode(encoded(*(file(str(number), size=0) for number in range(20_001))))
    with pytest.raises(InvalidCaches):
        CacheIndex.decode(b"\xff no JSON")
    with pytest.raises(InvalidCaches):
        CacheIndex.decode(encoded(file("a"), variable="../HOME"))


@pytest.mark.parametrize(("held", "why"), [(b"ab", "shorter"), (b"abcd", "longer"), (b"", "shorter")])
def test_pieces_of_another_length_are_refused(held: bytes, why: str) -> None:
    index = CacheIndex(caches=(Cache(variable="TRITON_CACHE_DIR", files=(CacheFile.model_validate(file("a", size=3)),)),))
    with pytest.raises(InvalidCaches, match=why):
        list(contents(index, lambda name: held))
