"""A snapshot copied from store to store: as it is, verified, only what is missing, and nothing of it stays here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from restore_agent.snapshots.keyring import NoSigningKey, Untrusted
from restore_agent.snapshots.names import NameRecord, SeenNames
from restore_agent.snapshots.store import Store
from restore_agent.transfer.copying import Copier
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.finding import NotElsewhere
from restore_agent.transfer.layout import chunk_key, name_key
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.pull import Puller
from restore_agent.transfer.source import Altered, Denied
from tests.worlds.travelling import CONTENT, Watched, node, published

NAME = name_key("default", "small")


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Store]:
    with node(tmp_path / "origin") as store:
        yield store


@pytest.fixture
def between(tmp_path: Path, origin: Store) -> Iterator[Store]:
    """A node that copies; it has no snapshot."""
    with node(tmp_path / "between", origin) as store:
        yield store


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Watched]:
    (tmp_path / "one").mkdir()
    remote = Watched(tmp_path / "one")
    yield remote
    await remote.close()


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Directory]:
    (tmp_path / "two").mkdir()
    remote = Directory(tmp_path / "two")
    yield remote
    await remote.close()


async def _copy(store: Store, one: Directory, two: Directory, told: list[Progress] | None = None) -> NameRecord:
    return await Copier(store, SeenNames(store.state), one, two).copy("default", "small", [].append if told is None else told.append)


async def _has(remote: Directory, folder: Path) -> dict[str, bytes]:
    return {stored.key: (folder / stored.key).read_bytes() async for stored in remote.objects("")}


async def test_it_is_the_same_there_and_nothing_stays_here(
    origin: Store, between: Store, one: Watched, two: Directory, tmp_path: Path
) -> None:
    snapshot = await published(origin, one, tmp_path)
    (between.keyring.folder / "signing.pem").unlink()
    told: list[Progress] = []
    assert (await _copy(between, one, two, told)).digest == snapshot.digest
    assert await _has(two, tmp_path / "two") == await _has(one, tmp_path / "one"), "it is a mirror, which needs no key that signs"
    assert told[-1].done == told[-1].moved == told[-1].total > 0
    assert between.list() == [] and not list((between.state / "chunks").glob("*/*"))
    pulled = await Puller(between, SeenNames(between.state), [two]).pull("default", "small")
    between.verify(pulled)


async def test_what_is_there_is_neither_read_nor_sent(origin: Store, between: Store, one: Watched, two: Directory, tmp_path: Path) -> None:
    snapshot = await published(origin, one, tmp_path)
    first = await _copy(between, one, two)
    del one.reads[:]
    told: list[Progress] = []
    assert await _copy(between, one, two, told) == first
    assert told[-1].moved == 0 and not {chunk_key(chunk.hash) for chunk in snapshot.chunks} & set(one.reads)


async def test_one_that_was_cut_goes_on_where_it_stopped(
    origin: Store, between: Store, one: Watched, two: Directory, tmp_path: Path
) -> None:
    snapshot = await published(origin, one, tmp_path)
    one.refused = chunk_key(snapshot.chunks[-1].hash)
    one.once = lambda: all((tmp_path / "two" / chunk_key(chunk.hash)).exists() for chunk in snapshot.chunks[:-1])
    with pytest.raises(Denied):
        await _copy(between, one, two)
    there = set(await _has(two, tmp_path / "two"))
    assert NAME not in there
    one.refused = ""
    del one.reads[:]
    await _copy(between, one, two)
    pages = {chunk_key(chunk.hash) for chunk in snapshot.chunks}
    assert pages & set(one.reads) == {chunk_key(snapshot.chunks[-1].hash)}


async def test_a_flipped_bit_gets_no_name(origin: Store, between: Store, one: Watched, two: Directory, tmp_path: Path) -> None:
    snapshot = await published(origin, one, tmp_path)
    path = tmp_path / "one" / chunk_key(snapshot.chunks[0].hash)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(Altered, match="has other bytes under the name of"):
        await _copy(between, one, two)
    there = await _has(two, tmp_path / "two")
    assert NAME not in there and chunk_key(snapshot.chunks[0].hash) not in there


async def test_what_does_not_count_here_is_not_copied(origin: Store, between: Store, one: Watched, two: Directory, tmp_path: Path) -> None:
    await published(origin, one, tmp_path)
    with node(tmp_path / "stranger") as stranger, pytest.raises(Untrusted):
        await _copy(stranger, one, two)
    assert await _has(two, tmp_path / "two") == {}
    (tmp_path / "one" / NAME).unlink()
    with pytest.raises(NotElsewhere):
        await _copy(between, one, two)


async def test_another_snapshot_of_the_name_gives_way_above_its_number(
    origin: Store, between: Store, one: Watched, two: Directory, tmp_path: Path
) -> None:
    await published(origin, two, tmp_path, CONTENT * 2)
    wanted = await published(origin, one, tmp_path)
    await published(origin, two, tmp_path, CONTENT * 3)
    signing = between.keyring.folder / "signing.pem"
    signing.rename(tmp_path / "away")
    with pytest.raises(NoSigningKey):
        await _copy(between, one, two)
    (tmp_path / "away").rename(signing)
    record = await _copy(between, one, two)
    assert (record.digest, record.sequence) == (wanted.digest, 4)
