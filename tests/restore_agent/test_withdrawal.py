"""A name taken out of a store: by a signed record above all before, so that nobody who has seen it takes an older one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from restore_agent.snapshots.keyring import NoSigningKey
from restore_agent.snapshots.names import Replayed, SeenNames
from restore_agent.snapshots.store import Store
from restore_agent.transfer.copying import Copier
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.finding import NotElsewhere, names_in
from restore_agent.transfer.layout import manifest_key, name_key
from restore_agent.transfer.publish import Publisher
from restore_agent.transfer.pull import Puller
from restore_agent.transfer.source import Absent, Denied, Piece, Unreachable
from restore_agent.transfer.withdrawal import withdraw
from tests.worlds.travelling import node, published, take

NAME = name_key("default", "small")


class _Refusing(Directory):
    """It does not let us write."""

    async def put(self, key: str, data: Piece) -> None:
        raise Denied(f"{self} does not let us write {key}")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with node(tmp_path / "state") as store:
        yield store


@pytest.fixture
def fresh(tmp_path: Path, store: Store) -> Iterator[Store]:
    with node(tmp_path / "fresh", store) as fresh:
        yield fresh


async def _withdraw(store: Store, remote: Directory) -> str:
    return await withdraw(store, SeenNames(store.state), remote, "default", "small")


async def test_the_name_stands_for_nothing_and_its_bytes_stay(store: Store, fresh: Store, remote: Directory, tmp_path: Path) -> None:
    snapshot = await published(store, remote, tmp_path)
    before = {stored.key async for stored in remote.objects("")}
    assert await _withdraw(store, remote) == snapshot.digest
    assert {stored.key async for stored in remote.objects("")} == before
    assert await names_in(remote, "default") == []
    puller = Puller(fresh, SeenNames(fresh.state), [remote])
    with pytest.raises(NotElsewhere, match="the name was withdrawn from its store"):
        await puller.pull("default", "small")
    with pytest.raises(NotElsewhere, match="the name was withdrawn from its store"):
        await Copier(fresh, SeenNames(fresh.state), remote, remote).copy("default", "small")
    pulled = await puller.pull("default", "small", snapshot.digest)
    assert pulled.digest == snapshot.digest, "who has its digest is still served"


async def test_the_record_of_before_is_refused_by_who_has_seen_this_one(
    store: Store, fresh: Store, remote: Directory, tmp_path: Path
) -> None:
    await published(store, remote, tmp_path)
    older = (tmp_path / "remote" / NAME).read_bytes()
    await _withdraw(store, remote)
    with pytest.raises(NotElsewhere):
        await Puller(fresh, SeenNames(fresh.state), [remote]).pull("default", "small")
    (tmp_path / "remote" / NAME).write_bytes(older)
    for each in (store, fresh):
        each_sees = Puller(each, SeenNames(each.state), [remote])
        with pytest.raises(Replayed, match="somebody brought back an older one"):
            await each_sees.pull("default", "small")


async def test_a_name_that_is_given_anew_counts_on(store: Store, fresh: Store, remote: Directory, tmp_path: Path) -> None:
    """Also by a node that has seen none of it."""
    await published(store, remote, tmp_path)
    await _withdraw(store, remote)
    record = await Publisher(fresh, SeenNames(fresh.state), remote).publish(take(fresh, tmp_path / "model"))
    assert record.sequence == 3, "it was 1, and 2 as it was withdrawn"
    assert await names_in(remote, "default") == ["small"]


async def test_absent_and_denied_are_told_apart_and_change_nothing(store: Store, remote: Directory, tmp_path: Path) -> None:
    with pytest.raises(Absent, match="there is nothing to withdraw"):
        await _withdraw(store, remote)
    assert list((tmp_path / "remote").iterdir()) == []
    await published(store, remote, tmp_path)
    refusing = _Refusing(tmp_path / "remote")
    with pytest.raises(Denied):
        await _withdraw(store, refusing)
    await refusing.close()
    assert await names_in(remote, "default") == ["small"]
    await _withdraw(store, remote)
    with pytest.raises(Absent, match="was withdrawn already"):
        await _withdraw(store, remote)
    gone = Directory(tmp_path / "gone")
    with pytest.raises(Unreachable):
        await _withdraw(store, gone)
    await gone.close()


async def test_a_record_that_nobody_here_trusts_can_be_withdrawn(store: Store, remote: Directory, tmp_path: Path) -> None:
    with node(tmp_path / "stranger") as stranger:
        snapshot = await published(stranger, remote, tmp_path)
    assert await _withdraw(store, remote) == ""
    assert (tmp_path / "remote" / manifest_key(snapshot.digest)).exists()
    await remote.put(NAME, b"{torn")
    assert await _withdraw(store, remote) == ""
    assert await names_in(remote, "default") == []


async def test_a_node_that_signs_nothing_withdraws_nothing(store: Store, remote: Directory, tmp_path: Path) -> None:
    await published(store, remote, tmp_path)
    (store.keyring.folder / "signing.pem").unlink()
    with pytest.raises(NoSigningKey):
        await _withdraw(store, remote)
    assert await names_in(remote, "default") == ["small"]
