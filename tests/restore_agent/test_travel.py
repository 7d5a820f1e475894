"""A node's snapshots that leave for a store and come from one: leased while they are read, and told of when they have come."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from restore_agent.sequences.travel import NoStore, Travel
from restore_agent.snapshots.catalog import NotFound, Snapshot
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.manifest import Manifest
from restore_agent.transfer.complaints import Complaints
from restore_agent.transfer.contents import held
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.source import Denied
from restore_agent.transfer.store_url import InvalidUrl
from tests.worlds.travelling import node, take


def _ignored(progress: Progress) -> None:
    """Nobody looks at it."""


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "remote").mkdir()
    return f"file://{tmp_path}/remote"


async def test_a_snapshot_goes_by_a_folder_from_one_node_to_another(tmp_path: Path, url: str) -> None:
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        snapshot = take(one, tmp_path / "model")
        await Travel(one, lambda snapshot: None).push(snapshot, url, _ignored)
        shutil.rmtree(tmp_path / "model")
        heard: list[Snapshot] = []
        pulled = await Travel(two, heard.append).pull("default", "small", "", [f"file://{tmp_path}", url], _ignored, replace=False)
        assert heard == [pulled] == [two.get("default", "small")]
        two.verify(pulled)


async def test_a_snapshot_goes_by_a_store_that_tells_nothing_of_it(tmp_path: Path, url: str) -> None:
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two, node(tmp_path / "three", one) as three:
        EncryptionKeys(one.keyring.folder).make()
        shutil.copy(one.keyring.folder / "encryption.key", two.keyring.folder)
        snapshot = take(one, tmp_path / "model")
        await Travel(one, lambda snapshot: None).push(snapshot, url, _ignored)
        stored = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
        hashes = {chunk.chunk.hash for chunk in held(one, snapshot)}
        assert not hashes & {path.name for path in stored}
        assert not [path for path in stored if "names" not in path.parts and b"small" in path.read_bytes()]
        told: list[Progress] = []
        await Travel(one, lambda snapshot: None).push(snapshot, url, told.append)
        assert told[-1].moved == 0
        shutil.rmtree(tmp_path / "model")
        with pytest.raises(Denied, match=r"has no key to decrypt by: bring it there, as encryption\.key"):
            await Travel(three, lambda snapshot: None).pull("default", "small", "", [url], _ignored, replace=False)
        with pytest.raises(Denied, match=r"has no encryption\.key"):
            await Travel(three, lambda snapshot: None).push(take(three, tmp_path / "other"), url, _ignored)
        pulled = await Travel(two, lambda snapshot: None).pull("default", "small", "", [url], _ignored, replace=False)
        assert pulled.digest == snapshot.digest
        two.verify(pulled)


async def test_what_is_removed_while_it_is_sent_is_sent_whole(tmp_path: Path, url: str) -> None:
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        snapshot = take(one, tmp_path / "model")

        def remove(progress: Progress) -> None:
            if not progress.done:
                one.remove("default", "small")

        await Travel(one, lambda snapshot: None).push(snapshot, url, remove)
        with pytest.raises(NotFound):
            one.get("default", "small")
        two.verify(await Travel(two, lambda snapshot: None).pull("default", "small", "", [url], _ignored, replace=False))
        one.sweep()
        assert not list((one.state / "chunks").glob("*/*"))


async def test_one_that_two_ask_for_at_once_comes_once(tmp_path: Path, url: str) -> None:
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        await Travel(one, lambda snapshot: None).push(take(one, tmp_path / "model"), url, _ignored)
        travel, moved = Travel(two, lambda snapshot: None), [0, 0]

        async def pull(which: int) -> Snapshot:
            def progress(now: Progress) -> None:
                moved[which] = now.moved

            return await travel.pull("default", "small", "", [url], progress, replace=True)

        first, second = await asyncio.gather(pull(0), pull(1))
        assert first.digest == second.digest and moved[0] and not moved[1]
        two.verify(first)


async def test_how_far_one_is_that_comes_is_known_until_it_has_come_or_was_given_up(tmp_path: Path, url: str) -> None:
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        snapshot = take(one, tmp_path / "model")
        await Travel(one, lambda snapshot: None).push(snapshot, url, _ignored)
        travel, seen = Travel(two, lambda snapshot: None), list[tuple[str, Progress]]()

        def look(now: Progress) -> None:
            seen.append(travel.arriving["default", "small"])
            assert seen[-1][1] == now

        def full(now: Progress) -> None:
            look(now)
            if now.moved:
                raise OSError("the disk is full")

        with pytest.raises(OSError, match="the disk is full"):
            await travel.pull("default", "small", "", [url], full, replace=False)
        assert not travel.arriving
        await travel.pull("default", "small", snapshot.digest, [url], look, replace=False)
        assert not travel.arriving
        assert travel.remote_to_disk.rate > 0
        (source,) = travel.sources
        assert (source.name, source.fault) == (url, "") and source.bandwidth.rate > 0
        digest, last = seen[-1]
        assert digest == snapshot.digest and last.done == last.total > 0 < last.moved


async def test_a_store_that_does_wrong_is_named_though_another_serves(tmp_path: Path, url: str) -> None:
    """One has nothing, which is no wrong, and one has under that name what nobody here trusts."""
    hostile, empty = f"file://{tmp_path}/hostile", f"file://{tmp_path}/empty"
    for folder in ("hostile", "empty"):
        (tmp_path / folder).mkdir()
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two, node(tmp_path / "stranger") as stranger:
        await Travel(one, lambda snapshot: None).push(take(one, tmp_path / "model"), url, _ignored)
        await Travel(stranger, lambda snapshot: None).push(take(stranger, tmp_path / "model"), hostile, _ignored)
        complaints = Complaints()
        travel = Travel(two, lambda snapshot: None)
        two.verify(await travel.pull("default", "small", "", [empty, hostile, url], _ignored, replace=False, complaints=complaints))
        assert {each.name for each in travel.sources} == {empty, hostile, url}
        [text] = complaints.texts
        assert hostile.removeprefix("file://") in text and "not trusted here" in text


async def test_what_does_not_fit_is_not_fetched(tmp_path: Path, url: str) -> None:
    def fits(manifest: Manifest) -> None:
        raise Incompatible(f"it was taken on kernel {manifest.fits.kernel}")

    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        await Travel(one, lambda snapshot: None).push(take(one, tmp_path / "model"), url, _ignored)
        with pytest.raises(Incompatible, match="it was taken on kernel"):
            await Travel(two, lambda snapshot: None).pull("default", "small", "", [url], _ignored, replace=True, fits=fits)
        assert not list((two.state / "chunks").glob("*/*")) and not (two.state / "arriving").exists()


async def test_a_url_that_is_none_is_said(tmp_path: Path) -> None:
    with node(tmp_path / "one") as one:
        travel = Travel(one, lambda snapshot: None)
        with pytest.raises(NoStore, match="say where from"):
            await travel.pull("default", "small", "", [], _ignored, replace=False)
        with pytest.raises(InvalidUrl, match="ftp"):
            await travel.push(take(one, tmp_path / "model"), "ftp://models", _ignored)


async def test_what_a_store_has_is_said_without_fetching_it(tmp_path: Path, url: str) -> None:
    def unfit(manifest: Manifest) -> None:
        raise Incompatible("another kernel")

    def fits(manifest: Manifest) -> None:
        """It does."""

    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        snapshot = take(one, tmp_path / "model")
        await Travel(one, lambda snapshot: None).push(snapshot, url, _ignored)
        travel = Travel(two, lambda snapshot: None)
        found = await travel.find("default", "small", url, fits)
        assert (found.digest, found.manifest, found.unfit) == (snapshot.digest, snapshot.manifest, "")
        assert (await travel.find("default", "small", url, unfit)).unfit == "another kernel"
        assert two.list() == [] and not list((two.state / "chunks").glob("*/*"))
        assert await travel.names("default", url) == ["small"]


async def test_a_copy_into_a_store_with_a_key_is_encrypted_there(tmp_path: Path, url: str) -> None:
    (tmp_path / "sealed").mkdir()
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        await Travel(one, lambda snapshot: None).push(take(one, tmp_path / "model"), url, _ignored)
        EncryptionKeys(two.keyring.folder).make()
        travel = Travel(two, lambda snapshot: None)
        await travel.copy("default", "small", url, f"file://{tmp_path}/sealed", _ignored)
        plain, sealed = ({path.name for path in (tmp_path / each / "chunks").glob("*/*")} for each in ("remote", "sealed"))
        assert plain and sealed and not plain & sealed
        two.verify(await travel.pull("default", "small", "", [f"file://{tmp_path}/sealed"], _ignored, replace=False))
        with pytest.raises(NoStore, match="is named twice"):
            await travel.copy("default", "small", url, url, _ignored)
