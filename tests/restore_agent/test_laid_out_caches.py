"""A compile cache that is filled from a snapshot: whole or not at all, over nothing that is there, and through no link."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from restore_agent.places import laid_out_caches
from restore_agent.places.laid_out_caches import APART, CannotLayOut, LaidOutCache
from restore_agent.snapshots.compile_caches import CacheFile

THERE = {"aa/one.so": b"one", "aa/bb/two.so": b"two", "three.py": b"three"}


def files(contents: Mapping[str, bytes] = THERE, mode: int = 0o644) -> list[CacheFile]:
    return [CacheFile(path=path, size=len(data), mode=mode, changed=1_700_000_000_123_456_789) for path, data in contents.items()]


def lay_out(cache: Path, contents: Mapping[str, bytes] = THERE, mode: int = 0o644) -> list[str]:
    """Which were missing."""
    with LaidOutCache.held(cache) as held:
        missing = held.missing(files(contents, mode))
        if missing:
            held.lay_out(missing, lambda file: contents[file.path])
        return [file.path for file in missing]


def found(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_a_cache_comes_whole_with_times_and_rights_and_the_second_time_nothing_is_done(tmp_path: Path) -> None:
    cache = tmp_path / "none/cache"
    assert lay_out(cache, mode=0o777) == list(THERE) and found(cache) == THERE
    at = (cache / "aa/one.so").stat()
    assert (at.st_mode & 0o7777, at.st_mtime_ns, at.st_uid) == (0o755, 1_700_000_000_123_456_789, os.geteuid())
    assert lay_out(cache) == [] and found(cache) == THERE


def test_what_is_there_stays_and_what_lacks_comes(tmp_path: Path) -> None:
    (tmp_path / "aa").mkdir()
    (tmp_path / "aa/one.so").write_bytes(b"ours")
    (tmp_path / "three.py").symlink_to("/nowhere")
    assert lay_out(tmp_path) == ["aa/bb/two.so"]
    assert (tmp_path / "aa/one.so").read_bytes() == b"ours" and (tmp_path / "three.py").is_symlink()
    assert (tmp_path / "aa/bb/two.so").read_bytes() == b"two"


def test_no_link_is_followed(tmp_path: Path) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    cache.mkdir()
    outside.mkdir()
    (cache / "aa").symlink_to(outside)
    assert lay_out(cache) == ["three.py"]
    assert not list(outside.iterdir())


def test_a_folder_of_others_and_one_in_which_others_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    with pytest.raises(CannotLayOut, match=r"others may write there"):
        lay_out(tmp_path / "open")
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotLayOut, match=r"cannot be written"):
        lay_out(tmp_path / "file")
    assert not list((tmp_path / "open").iterdir())


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LaidOutCache.held(tmp_path) as held:

        def content(file: CacheFile) -> bytes:
            if file.path == "three.py":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return THERE[file.path]

        with pytest.raises(CannotLayOut, match=r"No space left on device: make room there"):
            held.lay_out(files(), content)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(laid_out_caches, "_SPARE", 1 << 62)
    with pytest.raises(CannotLayOut, match=r"MiB would come: make room there"):
        lay_out(tmp_path)


def test_another_agent_at_work_is_not_waited_for(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(CannotLayOut, match=r"another agent is at work"):
        lay_out(tmp_path)
    os.close(fd)
    assert lay_out(tmp_path) == list(THERE)


@pytest.mark.parametrize("moment", ["writing", "putting"])
def test_one_that_is_killed_is_finished_by_the_next(tmp_path: Path, moment: str) -> None:
    cache = tmp_path / "cache"
    program = f"""
import os, signal
from pathlib import Path
from restore_agent.places import laid_out_caches
from restore_agent.snapshots.compile_caches import CacheFile
there = {THERE!r}
files = [CacheFile(path=path, size=len(data), mode=0o644, changed=5) for path, data in there.items()]
def content(file):
    if {moment!r} == "writing" and file.path == "three.py":
        os.kill(os.getpid(), signal.SIGKILL)
    return there[file.path]
def killed(tree, source, target):
    os.rename("aa", "aa", src_dir_fd=source, dst_dir_fd=target)
    os.kill(os.getpid(), signal.SIGKILL)
laid_out_caches._put = killed
with laid_out_caches.LaidOutCache.held(Path({str(cache)!r})) as held:
    held.lay_out(files, content)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False)
    assert ended.returncode == -signal.SIGKILL
    placed = {path for path in found(cache) if not path.startswith(APART)}
    assert placed == (set() if moment == "writing" else {"aa/one.so", "aa/bb/two.so"}), "a folder comes whole or not at all"
    lay_out(cache)
    assert found(cache) == THERE, "and what was apart is gone"
