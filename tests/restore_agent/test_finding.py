"""What stores have under a name: the newest counts, a store that lies or refuses hides nothing, and nothing unverified is believed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.keyring import Untrusted
from restore_agent.snapshots.names import SeenNames
from restore_agent.snapshots.store import Store
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.finding import NotElsewhere, manifest_of, names_in, newest_record, record_of
from restore_agent.transfer.layout import manifest_key, name_key
from restore_agent.transfer.publish import Publisher
from restore_agent.transfer.source import Altered, Unreachable
from tests.worlds.travelling import CONTENT, node, take


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with node(tmp_path / "state") as store:
        yield store


@pytest.fixture
async def remotes(tmp_path: Path) -> AsyncIterator[list[Directory]]:
    """Two stores, both of them empty."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    remotes = [Directory(tmp_path / name) for name in ("one", "two")]
    yield remotes
    for remote in remotes:
        await remote.close()


async def _publish(store: Store, remote: Directory, tmp_path: Path, content: bytes = CONTENT, name: str = "small") -> Snapshot:
    snapshot = take(store, tmp_path / "model", content, name)
    await Publisher(store, SeenNames(store.state), remote).publish(snapshot)
    return snapshot


async def test_the_newest_record_counts_wherever_it_is(store: Store, remotes: list[Directory], tmp_path: Path) -> None:
    await _publish(store, remotes[0], tmp_path)
    newer = await _publish(store, remotes[1], tmp_path, CONTENT + CONTENT)
    for order in (remotes, remotes[::-1]):
        assert (await newest_record(order, store.keyring, "default", "small")).digest == newer.digest


async def test_a_store_that_is_away_or_lies_hides_nothing(store: Store, remotes: list[Directory], tmp_path: Path) -> None:
    snapshot = await _publish(store, remotes[1], tmp_path)
    await remotes[0].put(name_key("default", "small"), b"{torn")
    await remotes[0].put(manifest_key(snapshot.digest), b"{}")
    record = await newest_record(remotes, store.keyring, "default", "small")
    _, _, manifest = await manifest_of(remotes, store.keyring, "default", "small", record.digest)
    assert manifest == snapshot.manifest
    with pytest.raises(Untrusted, match="is torn"):
        await newest_record(remotes[:1], store.keyring, "default", "small")
    with pytest.raises(Altered, match="has another manifest under"):
        await manifest_of(remotes[:1], store.keyring, "default", "small", record.digest)


async def test_nowhere_is_told_apart_from_not_reached(store: Store, remotes: list[Directory], tmp_path: Path) -> None:
    with pytest.raises(NotElsewhere, match="no snapshot default/small on file://"):
        await newest_record(remotes, store.keyring, "default", "small")
    with pytest.raises(NotElsewhere, match="no snapshot default/small on file://"):
        await record_of(remotes[0], store.keyring, "default", "small")
    (tmp_path / "two").rmdir()
    with pytest.raises(Unreachable, match="mount it, or make the folder"):
        await newest_record(remotes, store.keyring, "default", "small")


async def test_a_manifest_under_another_name_is_refused(store: Store, remotes: list[Directory], tmp_path: Path) -> None:
    snapshot = await _publish(store, remotes[0], tmp_path)
    with pytest.raises(Untrusted, match="that the stores have as default/other is default/small"):
        await manifest_of(remotes, store.keyring, "default", "other", snapshot.digest)


async def test_the_names_of_a_namespace_are_listed(store: Store, remotes: list[Directory], tmp_path: Path) -> None:
    assert await names_in(remotes[0], "default") == []
    for name in ("small", "another"):
        await _publish(store, remotes[0], tmp_path, name=name)
    await remotes[0].put("names/default/Not a name.json", b"")
    await remotes[0].put("names/elsewhere/third.json", b"")
    assert await names_in(remotes[0], "default") == ["another", "small"]
