"""Uploads and collections of one store: whoever begins, at least one of them sees the other, and the dead keep nobody waiting."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from blake3 import blake3

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.leases import DEAD, Claim, collecting, uploading
from restore_agent.transfer.source import Altered, Unreachable
from tests.worlds.virtual_time import StandingClock

CHUNKS = [Chunk(blake3(b"a").hexdigest(), 1)]


def _leases(folder: Path) -> list[Path]:
    return sorted((folder / "remote/leases").iterdir())


async def test_a_collection_sees_what_an_upload_counts_on_and_both_leave_nothing(remote: Directory, tmp_path: Path) -> None:
    async with uploading(remote, "ab" * 32, CHUNKS):
        async with collecting(remote, removes=True) as collection:
            assert await collection.uploads() == [Claim("ab" * 32, (CHUNKS[0].hash,))]
            assert await collection.collections() == []
        async with collecting(remote, removes=False) as collection:
            assert len(await collection.uploads()) == 1
    assert _leases(tmp_path) == []


async def test_an_upload_waits_for_the_end_of_a_collection(remote: Directory) -> None:
    begun = asyncio.Event()

    async def upload() -> None:
        async with uploading(remote, "ab" * 32, CHUNKS):
            begun.set()

    async with collecting(remote, removes=True) as collection:
        task = asyncio.create_task(upload())
        while not await collection.uploads():
            await asyncio.sleep(0.01)
        assert not begun.is_set()
    await task
    assert begun.is_set()


async def test_what_was_not_renewed_is_dead(remote: Directory, tmp_path: Path) -> None:
    for kind, content in (("collection", b"{}"), ("upload", b"{torn")):
        await remote.put(f"leases/{kind}-0123456789abcdef.json", content)
    async with collecting(remote, removes=False) as collection:
        assert len(await collection.collections()) == 1
        with pytest.raises(Altered, match="does not say what an upload needs"):
            await collection.uploads()
    for path in _leases(tmp_path):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - DEAD))
    async with uploading(remote, "ab" * 32, CHUNKS) as lease:
        assert await lease.others("upload") == []


async def test_who_could_not_renew_stops(remote: Directory, tmp_path: Path) -> None:
    clock = StandingClock(1_800_000_000.0)
    async with uploading(remote, "ab" * 32, CHUNKS, clock) as lease:
        lease.check()
        lease._at = lease._at[0] - 301.0, lease._at[1]
        with pytest.raises(Unreachable, match="begin again"):
            lease.check()
        await lease.renew()
        lease.check()
        _leases(tmp_path)[0].unlink()
        with pytest.raises(Unreachable, match="has lost"):
            await lease.collections()


async def test_a_lease_outlives_a_request_whose_end_is_not_known(remote: Directory, tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        async with uploading(remote, "ab" * 32, CHUNKS):
            raise Unreachable("it broke off")
    assert len(_leases(tmp_path)) == 1
    with pytest.raises(ValueError, match="known"):
        async with collecting(remote, removes=True):
            raise ValueError("known")
    assert len(_leases(tmp_path)) == 1
