"""What no name of a store needs is removed, and nothing else: wherever uploads, withdrawals and collections are ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.manifest import layout_file
from restore_agent.snapshots.names import SeenNames
from restore_agent.snapshots.page_runs import PAGE
from restore_agent.snapshots.store import Store
from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.collection import GRACE, Busy, Collected, Collector, Uncollectable
from restore_agent.transfer.contents import chunks_of
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.finding import manifest_of, names_in, newest_record
from restore_agent.transfer.layout import chunk_key, manifest_key, name_key
from restore_agent.transfer.leases import collecting, uploading
from restore_agent.transfer.opened_store import OpenedStore
from restore_agent.transfer.publish import Publisher
from restore_agent.transfer.source import Absent, Piece, Stored
from restore_agent.transfer.withdrawal import withdraw
from tests.worlds.s3_server import S3Server
from tests.worlds.snapshots import publish
from tests.worlds.travelling import CONTENT, node, published, take

_COLLECTION = "leases/collection-0123456789abcdef.json"
_CONTENTS = [random.Random(number).randbytes(300 * PAGE) for number in range(3)]


class _Crash(BaseException):
    """Nothing catches it."""


class _Fragile(Directory):
    """It ends the writer at a write."""

    left = -1

    def _count(self) -> None:
        if self.left == 0:
            raise _Crash
        self.left -= 1

    async def put(self, key: str, data: Piece) -> None:
        self._count()
        await super().put(key, data)

    async def remove(self, key: str) -> None:
        self._count()
        await super().remove(key)


class _Slow(Directory):
    """It removes a chunk, and gives a name, when it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.begun, self.may = asyncio.Event(), asyncio.Event()

    async def remove(self, key: str) -> None:
        if key.startswith("chunks/"):
            self.begun.set()
            await self.may.wait()
        await super().remove(key)

    async def put(self, key: str, data: Piece) -> None:
        if key.startswith("names/"):
            self.begun.set()
            await self.may.wait()
        await super().put(key, data)


class _Collected(Directory):
    """A collection begins once a manifest is put, and ends after somebody has looked for one twice."""

    looks = -1
    told: list[int]

    async def put(self, key: str, data: Piece) -> None:
        if key.startswith("names/"):
            self.told.append(self.looks)
        await super().put(key, data)
        if key.endswith("/manifest.json"):
            self.looks, self.told = 0, []
            await super().put(_COLLECTION, b"{}")

    async def objects(self, prefix: str) -> AsyncIterator[Stored]:
        if prefix == "leases" and self.looks >= 0:
            self.looks += 1
            if self.looks > 2:
                await self.remove(_COLLECTION)
        async for stored in super().objects(prefix):
            yield stored


class _Losing(Directory):
    """It loses an object once a manifest is put."""

    loses = ""

    async def put(self, key: str, data: Piece) -> None:
        await super().put(key, data)
        if self.loses and key.endswith("/manifest.json"):
            await self.remove(self.loses)
            self.loses = ""


def _age(folder: Path, seconds: float = 2 * GRACE) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with node(tmp_path / "state") as store:
        yield store


async def _collect(store: Store, remote: Directory | Bucket, *, dry_run: bool = False) -> Collected:
    opened = OpenedStore(remote, EncryptionKeys(store.keyring.folder), writes=False)
    return await Collector(store.keyring, opened).collect(dry_run=dry_run)


async def _whole(store: Store, remote: Directory | Bucket) -> set[str]:
    """The chunks of all names, each fetched and verified."""
    chunks = {}
    for name in await names_in(remote, "default"):
        record = await newest_record([remote], store.keyring, "default", name)
        _, _, manifest = await manifest_of([remote], store.keyring, "default", name, record.digest)
        chunks |= await chunks_of(manifest, Fetch(lambda chunk: [remote]))
    for chunk in chunks:
        await Fetch(lambda chunk: [remote]).bring(chunk, memoryview(bytearray(chunk.size)))
    return {chunk_key(chunk.hash) for chunk in chunks}


async def _keys(remote: Directory | Bucket, prefix: str) -> set[str]:
    return {stored.key async for stored in remote.objects(prefix)}


async def test_what_lost_its_name_goes_after_the_grace_and_what_is_shared_stays(store: Store, remote: Directory, tmp_path: Path) -> None:
    old = await published(store, remote, tmp_path)
    new = await published(store, remote, tmp_path, CONTENT[: 8 << 20] + b"!" * (2 << 20))
    before = await _keys(remote, "")
    assert (await _collect(store, remote)).chunks.objects == 0
    assert await _keys(remote, "") == before, "it was named until now"
    _age(tmp_path / "remote")
    would = await _collect(store, remote, dry_run=True)
    assert await _keys(remote, "") == before
    done = await _collect(store, remote)
    assert (done.chunks.objects, done.manifests.objects, done.names) == (would.chunks.objects, 2, 1) and done.chunks.objects > 0
    assert await _keys(remote, "chunks") == await _whole(store, remote)
    assert await _keys(remote, "snapshots") >= {manifest_key(new.digest)} and manifest_key(old.digest) not in await _keys(remote, "")


async def test_who_is_fetching_what_was_withdrawn_ends_well(store: Store, remote: Directory, tmp_path: Path) -> None:
    await published(store, remote, tmp_path)
    _age(tmp_path / "remote")
    await withdraw(store, SeenNames(store.state), remote, "default", "small")
    before = await _keys(remote, "")
    await _collect(store, remote)
    assert await _keys(remote, "") == before
    _age(tmp_path / "remote")
    await _collect(store, remote)
    assert await _keys(remote, "") == {name_key("default", "small")}


@pytest.mark.parametrize("spoil", ["record", "manifest", "no manifest", "layout", "key"])
async def test_what_cannot_be_told_ends_it_before_anything_is_removed(store: Store, remote: Directory, tmp_path: Path, spoil: str) -> None:
    snapshot = await published(store, remote, tmp_path)
    await remote.put(f"chunks/ab/{'ab' * 32}", b"garbage")
    manifest = tmp_path / "remote" / manifest_key(snapshot.digest)
    if spoil == "record":
        await remote.put(name_key("default", "small"), b"{torn")
    elif spoil == "manifest":
        manifest.write_bytes(manifest.read_bytes() + b" ")
    elif spoil == "no manifest":
        manifest.unlink()
    elif spoil == "layout":
        layout = layout_file(snapshot.manifest.weights[0])
        (tmp_path / "remote" / chunk_key(snapshot.manifest.files[layout].hash)).unlink()
    _age(tmp_path / "remote")
    before = await _keys(remote, "")
    with contextlib.ExitStack() as stack:
        by = stack.enter_context(node(tmp_path / "stranger")) if spoil == "key" else store
        with pytest.raises(Uncollectable, match="what default/small needs cannot be told"):
            await _collect(by, remote)
    assert await _keys(remote, "") == before


async def test_an_upload_that_is_under_way_keeps_what_it_found(store: Store, remote: Directory, tmp_path: Path) -> None:
    snapshot = await published(store, remote, tmp_path)
    await withdraw(store, SeenNames(store.state), remote, "default", "small")
    _age(tmp_path / "remote")
    before = await _keys(remote, "")
    async with uploading(remote, snapshot.digest, await chunks_of(snapshot.manifest, Fetch(lambda chunk: [remote]))):
        await _collect(store, remote)
        assert await _keys(remote, "chunks") == {key for key in before if key.startswith("chunks/")}
    async with collecting(remote, removes=True):
        with pytest.raises(Busy):
            await _collect(store, remote)


async def test_ended_by_its_caller_it_removes_nothing_once_its_lease_is_gone(store: Store, tmp_path: Path) -> None:
    """A thread of a folder, or a server, goes on with what it was asked for."""
    (tmp_path / "remote").mkdir()
    remote = _Slow(tmp_path / "remote")
    await remote.put(f"chunks/ab/{'ab' * 32}", b"garbage")
    _age(tmp_path / "remote")
    collecting = asyncio.create_task(_collect(store, remote))
    await remote.begun.wait()
    collecting.cancel()
    await asyncio.sleep(0)
    assert await _keys(remote, "leases"), "it is removing"
    remote.may.set()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert await _keys(remote, "") == set()
    await remote.close()


async def test_a_name_is_given_before_the_lease_goes(store: Store, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    remote = _Slow(tmp_path / "remote")
    snapshot = publish(store, _CONTENTS[0], "one")
    publishing = asyncio.create_task(Publisher(store, SeenNames(store.state), remote).publish(snapshot))
    await remote.begun.wait()
    publishing.cancel()
    await asyncio.sleep(0)
    assert await _keys(remote, "leases"), "the name may come yet"
    remote.may.set()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    assert await names_in(remote, "default") == ["one"] and not await _keys(remote, "leases")
    await remote.close()


async def test_a_name_waits_for_the_end_of_a_collection(store: Store, tmp_path: Path) -> None:
    """One that took its lease for dead, as its machine stood still."""
    (tmp_path / "remote").mkdir()
    remote = _Collected(tmp_path / "remote")
    await Publisher(store, SeenNames(store.state), remote).publish(publish(store, _CONTENTS[0], "one"))
    assert remote.told == [3], "it looked until there was none"
    await remote.close()


async def test_what_is_lost_while_the_rest_is_sent_is_sent_anew(store: Store, tmp_path: Path) -> None:
    """By an agent that knows no leases, say, or by hand."""
    (tmp_path / "remote").mkdir()
    remote = _Losing(tmp_path / "remote")
    await published(store, remote, tmp_path)
    await withdraw(store, SeenNames(store.state), remote, "default", "small")
    remote.loses = sorted(await _keys(remote, "chunks"))[0]
    await Publisher(store, SeenNames(store.state), remote).publish(take(store, tmp_path / "model"))
    assert not remote.loses and await _whole(store, remote) == await _keys(remote, "chunks")
    await remote.close()


async def test_what_nobody_of_us_makes_is_left_alone(store: Store, remote: Directory, tmp_path: Path) -> None:
    for key in ("chunks/readme.txt", "snapshots/mine/manifest.json", "names/notes", "else/where"):
        await remote.put(key, b"mine")
    (tmp_path / "remote/chunks/.nfs0001").write_bytes(b"a file that is open")
    (tmp_path / "remote/chunks/.abc.01234567").write_bytes(b"cut")
    _age(tmp_path / "remote")
    before = await _keys(remote, "")
    assert (await _collect(store, remote)).unfinished.objects == 1
    assert await _keys(remote, "") == before and (tmp_path / "remote/chunks/.nfs0001").exists()


async def test_a_bucket_is_collected(store: Store, s3: S3Server, bucket: str, tmp_path: Path) -> None:
    remote = Bucket(bucket, "fleet")
    for content in _CONTENTS[:2]:
        publisher = Publisher(store, SeenNames(store.state), remote)
        await publisher.publish(publish(store, content, "one", replace=True))
    _age(s3.root / bucket)
    done = await _collect(store, remote)
    assert done.chunks.objects > 0 and done.manifests.objects == 2
    assert await _keys(remote, "chunks") == await _whole(store, remote)
    await withdraw(store, SeenNames(store.state), remote, "default", "one")
    _age(s3.root / bucket)
    await _collect(store, remote)
    assert await _keys(remote, "chunks") == set() and await _keys(remote, "leases") == set()


_STEPS = st.tuples(
    st.sampled_from(["publish", "withdraw", "collect", "pass"]), st.sampled_from(["one", "two"]), st.integers(0, 2), st.integers(-1, 8)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_STEPS, min_size=1, max_size=6))
def test_whatever_is_done_and_wherever_it_is_ended_what_is_named_is_whole(steps: list[tuple[str, str, int, int]]) -> None:
    asyncio.run(_done(steps))


async def _done(steps: list[tuple[str, str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, node(Path(folder) / "state") as store:
        (Path(folder) / "remote").mkdir()
        remote = _Fragile(Path(folder) / "remote")
        seen = SeenNames(store.state)
        for what, name, content, ends_at in steps:
            remote.left = ends_at
            with contextlib.suppress(_Crash, Absent):
                if what == "publish":
                    snapshot = publish(store, _CONTENTS[0][: 100 * PAGE] + _CONTENTS[content], name, replace=True)
                    await Publisher(store, seen, remote).publish(snapshot)
                elif what == "withdraw":
                    await withdraw(store, seen, remote, "default", name)
                elif what == "collect":
                    await _collect(store, remote)
            await asyncio.to_thread(remote._threads.shutdown)  # what ends with a process does nothing afterwards
            await remote.close()
            remote = _Fragile(Path(folder) / "remote")
            if what == "pass" or ends_at >= 0:  # a lease of one that was ended is dead by then
                _age(Path(folder) / "remote")
            await _whole(store, remote)
        _age(Path(folder) / "remote")
        await _collect(store, remote)
        assert await _keys(remote, "chunks") == await _whole(store, remote)
        await remote.close()
