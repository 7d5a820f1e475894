"""Which files of its caches an engine has used: the kernel tells what was read, two looks what was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from restore_agent.places import cache_watch
from restore_agent.places.cache_watch import CacheWatch
from tests.worlds.processes import descriptors


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    (folder / "aa/bb").mkdir(parents=True)
    for name in ("top", "aa/read", "aa/bb/deep", "aa/bb/unread"):
        (folder / name).write_text(name)
    return folder


async def used(watch: CacheWatch) -> list[str]:
    return sorted((await watch.used())["TRITON_CACHE_DIR"])


async def test_what_is_read_written_and_replaced_is_used_and_nothing_else(cache: Path) -> None:
    with await CacheWatch.begun({"TRITON_CACHE_DIR": cache, "CUDA_CACHE_PATH": cache / "none"}) as watch:
        (cache / "aa/read").read_text()
        list((cache / "aa/bb").iterdir())
        (cache / "aa/bb/unread").stat()
        (cache / "new/er").mkdir(parents=True)
        (cache / "new/er/file").write_text("new")
        (cache / "fresh").write_text("another top")
        (cache / "fresh").rename(cache / "top")
        assert await used(watch) == ["aa/read", "new/er/file", "top"]
        assert (await watch.used())["CUDA_CACHE_PATH"] == []


async def test_a_cache_that_comes_into_being_is_used_whole(tmp_path: Path) -> None:
    with await CacheWatch.begun({"TRITON_CACHE_DIR": tmp_path / "late"}) as watch:
        (tmp_path / "late").mkdir()
        (tmp_path / "late/one").write_text("one")
        assert await used(watch) == ["one"]


async def test_where_the_kernel_does_not_tell_all_counts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_watch, "_MOST_FOLDERS", 1)
    with await CacheWatch.begun({"TRITON_CACHE_DIR": cache}) as watch:
        assert await used(watch) == ["aa/bb/deep", "aa/bb/unread", "aa/read", "top"]


async def test_events_that_were_lost_make_all_count(cache: Path) -> None:
    with await CacheWatch.begun({"TRITON_CACHE_DIR": cache}) as watch:
        most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
        for _ in range(most // 2 + 1):  # the same event twice in turn would be told once
            (cache / "top").open().close()
            (cache / "aa/read").open().close()
        assert await used(watch) == ["aa/bb/deep", "aa/bb/unread", "aa/read", "top"]


async def test_nothing_stays_open(cache: Path) -> None:
    before = descriptors(os.getpid())
    watch = await CacheWatch.begun({"TRITON_CACHE_DIR": cache})
    watch.close()
    watch.close()
    assert descriptors(os.getpid()) == before
