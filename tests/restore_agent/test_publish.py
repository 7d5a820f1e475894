"""A snapshot put into a store: in an order that may be ended anywhere, only what is missing, and the name last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from restore_agent.snapshots.catalog import Corrupt, Snapshot
from restore_agent.snapshots.keyring import NoSigningKey
from restore_agent.snapshots.names import NameRecord, SeenNames
from restore_agent.snapshots.store import Store
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.layout import manifest_key, name_key, signature_key
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.publish import Publisher
from restore_agent.transfer.source import Denied, Full, Piece, TransferError, Unreachable
from tests.worlds.travelling import CONTENT, node, take
from tests.worlds.virtual_time import StandingClock


class _Watched(Directory):
    """A folder that tells what is put into it, and fails when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.puts: list[str] = []
        self.begun = 0
        self.fails: dict[int, TransferError] = {}  # at which try to put, and by what

    async def put(self, key: str, data: Piece) -> None:
        if key.startswith("leases/"):
            return await super().put(key, data)
        self.begun += 1
        if error := self.fails.get(self.begun - 1):
            raise error
        await super().put(key, data)
        self.puts.append(key)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with node(tmp_path / "state") as store:
        yield store


@pytest.fixture
def snapshot(store: Store, tmp_path: Path) -> Snapshot:
    return take(store, tmp_path / "model")


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[_Watched]:
    (tmp_path / "remote").mkdir()
    remote = _Watched(tmp_path / "remote")
    yield remote
    await remote.close()


async def _publish(store: Store, remote: Directory, snapshot: Snapshot, progress: list[Progress] | None = None) -> NameRecord:
    publisher = Publisher(store, SeenNames(store.state), remote, StandingClock(1_800_000_000.0))
    return await publisher.publish(snapshot, [].append if progress is None else progress.append)


async def test_chunks_come_first_then_the_manifest_then_the_name(store: Store, remote: _Watched, snapshot: Snapshot) -> None:
    progress: list[Progress] = []
    record = await _publish(store, remote, snapshot, progress)
    *chunks, signature, manifest, name = remote.puts
    assert all(key.startswith("chunks/") for key in chunks)
    assert (signature, manifest) == (signature_key(snapshot.digest), manifest_key(snapshot.digest))
    assert name == name_key("default", "small")
    assert (record.digest, record.sequence, record.published) == (snapshot.digest, 1, "2027-01-15T08:00:00+00:00")
    total = sum([await remote.size(key) for key in chunks])
    assert progress[0] == Progress(0, 0, total) and progress[-1] == Progress(total, total, total)


async def test_what_is_there_is_not_sent_again(store: Store, remote: _Watched, snapshot: Snapshot, tmp_path: Path) -> None:
    first = await _publish(store, remote, snapshot)
    sent = len(remote.puts)
    progress: list[Progress] = []
    assert await _publish(store, remote, snapshot, progress) == first
    assert remote.puts[sent:] == [signature_key(snapshot.digest), manifest_key(snapshot.digest)]
    assert progress[-1].moved == 0
    other = take(store, tmp_path / "model", CONTENT[: 8 << 20] + b"!" * (2 << 20))
    del remote.puts[:]
    record = await _publish(store, remote, other)
    assert record.sequence == 2
    assert len([key for key in remote.puts if key.startswith("chunks/")]) == 1


async def test_a_torn_chunk_is_sent_again(store: Store, remote: _Watched, snapshot: Snapshot, tmp_path: Path) -> None:
    await _publish(store, remote, snapshot)
    torn = next((tmp_path / "remote/chunks").glob("*/*"))
    torn.write_bytes(b"torn")
    del remote.puts[:]
    await _publish(store, remote, snapshot)
    assert [key.rpartition("/")[2] for key in remote.puts][:-2] == [torn.name]


@pytest.mark.parametrize("at", [0, 2, -3, -2, -1])
async def test_ended_at_any_put_nothing_is_named_that_is_not_whole_and_the_next_goes_on(
    store: Store, remote: _Watched, snapshot: Snapshot, at: int, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    whole = _Watched(tmp_path / "whole")
    await _publish(store, whole, snapshot)
    await whole.close()
    remote.fails[range(len(whole.puts))[at]] = Full("the disk is full")
    with pytest.raises(Full):
        await _publish(store, remote, snapshot)
    assert not (tmp_path / "remote" / name_key("default", "small")).exists()
    if (tmp_path / "remote" / manifest_key(snapshot.digest)).exists():
        assert (tmp_path / "remote" / signature_key(snapshot.digest)).exists()
    remote.fails.clear()
    await _publish(store, remote, snapshot)
    keys = [key for key in remote.puts if key.startswith("chunks/")]
    assert len(keys) == len(set(keys)), "nothing is sent twice"
    there = {found.key async for found in remote.objects("chunks")}
    assert there == {key for key in whole.puts if key.startswith("chunks/")}


async def test_a_store_that_cannot_be_reached_for_a_moment_is_asked_again(store: Store, remote: _Watched, snapshot: Snapshot) -> None:
    remote.fails[1] = Unreachable("it restarts")
    await _publish(store, remote, snapshot)
    remote.fails[remote.begun] = Denied("no more")
    with pytest.raises(Denied):
        await _publish(store, remote, snapshot)


async def test_a_byte_that_this_node_has_lost_is_not_sent(store: Store, remote: _Watched, snapshot: Snapshot) -> None:
    path = store.chunks.path(snapshot.chunks[0].hash)
    path.write_bytes(b"!" + path.read_bytes()[1:])
    with pytest.raises(Corrupt, match="does not have the content that its name says"):
        await _publish(store, remote, snapshot)
    assert name_key("default", "small") not in remote.puts


async def test_weights_that_were_replaced_are_not_sent(store: Store, remote: _Watched, snapshot: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(Corrupt, match=r"model\.safetensors are others than it was taken with"):
        await _publish(store, remote, snapshot)
    path.unlink()
    with pytest.raises(Corrupt, match="cannot be read"):
        await _publish(store, remote, snapshot)


async def test_a_node_that_signs_nothing_publishes_nothing(store: Store, remote: _Watched, snapshot: Snapshot) -> None:
    (store.keyring.folder / "signing.pem").unlink()
    with pytest.raises(NoSigningKey):
        await _publish(store, remote, snapshot)
    assert remote.puts == []


async def test_a_name_that_nobody_here_trusts_gives_way_and_its_number_goes_up(
    store: Store, remote: _Watched, snapshot: Snapshot, tmp_path: Path
) -> None:
    with node(tmp_path / "stranger") as stranger:
        await _publish(stranger, remote, take(stranger, tmp_path / "model"))
        await _publish(stranger, remote, take(stranger, tmp_path / "model", CONTENT + CONTENT))
    assert (await _publish(store, remote, snapshot)).sequence == 3
    await remote.put(name_key("default", "small"), b"{torn")
    assert (await _publish(store, remote, snapshot)).sequence == 4


async def test_ended_by_its_caller_it_leaves_no_thread(store: Store, remote: _Watched, snapshot: Snapshot) -> None:
    reached, never = asyncio.Event(), asyncio.Event()

    async def hangs(key: str, data: Piece) -> None:
        reached.set()
        await never.wait()

    remote.put = hangs  # type: ignore[method-assign]
    publishing = asyncio.create_task(_publish(store, remote, snapshot))
    await reached.wait()
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
