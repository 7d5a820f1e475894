"""A snapshot brought from stores: whole and signed or not at all, and only what is missing after a cut."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from blake3 import blake3

from restore_agent.snapshots.catalog import Corrupt, NotFound, Snapshot
from restore_agent.snapshots.keyring import Untrusted
from restore_agent.snapshots.manifest import digest_of
from restore_agent.snapshots.names import Replayed, SeenNames
from restore_agent.snapshots.store import NameTaken, Store
from restore_agent.transfer.directory import Directory
from restore_agent.transfer.layout import chunk_key, manifest_key, name_key, signature_key
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.pull import Puller
from restore_agent.transfer.source import Altered, Denied, Full, Source, Unreachable
from tests.worlds.travelling import CONTENT, HEADER, WEIGHTS, Watched, node, published


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Store]:
    with node(tmp_path / "origin") as store:
        yield store


@pytest.fixture
def fresh(tmp_path: Path, origin: Store) -> Iterator[Store]:
    """A node that never had the snapshot, and has no folder with its model."""
    with node(tmp_path / "fresh", origin) as store:
        yield store


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Watched]:
    (tmp_path / "remote").mkdir()
    remote = Watched(tmp_path / "remote")
    yield remote
    await remote.close()


async def _pull(store: Store, *sources: Source, replace: bool = False, digest: str = "", told: list[Progress] | None = None) -> Snapshot:
    puller = Puller(store, SeenNames(store.state), sources)
    return await puller.pull("default", "small", digest, replace=replace, progress=[].append if told is None else told.append)


async def test_a_node_that_never_had_it_has_all_of_it(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    snapshot = await published(origin, remote, tmp_path)
    told: list[Progress] = []
    pulled = await _pull(fresh, remote, told=told)
    assert (pulled.digest, pulled.manifest) == (snapshot.digest, snapshot.manifest)
    fresh.verify(fresh.get("default", "small"))
    [region] = fresh.regions(pulled)
    assert (region.folder / "model.safetensors").read_bytes()[HEADER:] == WEIGHTS
    assert region.folder == fresh.fetched_weights(region.record)
    assert told[-1].done == told[-1].moved == told[-1].total == told[0].total - 4096
    assert list((fresh.state / "arriving").iterdir()) == []


async def test_one_that_is_here_costs_nothing(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    await published(origin, remote, tmp_path)
    first = await _pull(fresh, remote)
    del remote.reads[:]
    assert await _pull(fresh, remote) == first
    assert remote.reads == [name_key("default", "small")]


async def test_what_is_here_already_is_not_fetched(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    await published(origin, remote, tmp_path, keep_model=True)
    await _pull(fresh, remote)
    assert not (fresh.state / "fetched").exists(), "the model is on this node, too"
    second = await published(origin, remote, tmp_path, CONTENT[: 8 << 20] + b"!" * (2 << 20))
    with pytest.raises(NameTaken, match="default/small exists already, and is another one"):
        await _pull(fresh, remote)
    del remote.reads[:]
    assert (await _pull(fresh, remote, replace=True)).digest == second.digest
    pages = {chunk_key(chunk.hash) for chunk in second.chunks}
    assert len([key for key in remote.reads if key in pages]) == 1


@pytest.mark.parametrize("cut", ["pages", "weights"])
async def test_a_pull_that_was_cut_goes_on_where_it_stopped(origin: Store, fresh: Store, remote: Watched, tmp_path: Path, cut: str) -> None:
    snapshot = await published(origin, remote, tmp_path)
    pages = [chunk.hash for chunk in snapshot.chunks]
    weights = [blake3(WEIGHTS[at : at + 100_000]).hexdigest() for at in (0, 100_000, 200_000)]
    partial = fresh.fetched_weights(snapshot.manifest.weights[0]).with_name(f"{snapshot.manifest.weights[0].region}.arriving")

    def two_came() -> bool:
        if cut == "pages":
            return all(fresh.chunks.path(each).exists() for each in pages[:2])
        path = partial / "model.safetensors"
        return path.exists() and path.read_bytes()[HEADER:] == WEIGHTS[:200_000]

    remote.refused, remote.once = chunk_key((pages if cut == "pages" else weights)[2]), two_came
    with pytest.raises(Denied, match="withdrawn"):
        await _pull(fresh, remote)
    with pytest.raises(NotFound):
        fresh.get("default", "small")
    fresh.close()
    again = Store(fresh.state)  # the agent was ended, too
    remote.refused = ""
    del remote.reads[:]
    assert (await _pull(again, remote)).digest == snapshot.digest
    again.verify(again.get("default", "small"))
    assert again.regions(snapshot)[0].folder == again.fetched_weights(snapshot.manifest.weights[0])
    missing = [pages[2]] if cut == "pages" else [*pages, weights[2]]
    assert {key for key in remote.reads if key.startswith("chunks/")} == {chunk_key(each) for each in missing}
    again.close()


async def test_a_pull_whose_caller_went_goes_on_where_it_stopped(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    await published(origin, remote, tmp_path)
    some = asyncio.Event()

    def told(progress: Progress) -> None:
        if progress.done > 1 << 20:
            some.set()

    pulling = asyncio.create_task(Puller(fresh, SeenNames(fresh.state), [remote]).pull("default", "small", progress=told))
    await some.wait()
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    await _pull(fresh, remote)
    fresh.verify(fresh.get("default", "small"))


async def test_each_byte_is_from_whoever_has_it(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    snapshot = await published(origin, remote, tmp_path)
    shutil.copytree(tmp_path / "remote", tmp_path / "other")
    other = Watched(tmp_path / "other")
    one, two, three = [tmp_path / "remote" / chunk_key(chunk.hash) for chunk in snapshot.chunks]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-1] + b"!")
    three.write_bytes(three.read_bytes()[:5000])
    (tmp_path / "remote" / manifest_key(snapshot.digest)).write_bytes(b"other")
    await _pull(fresh, remote, other)
    fresh.verify(fresh.get("default", "small"))
    assert {key for key in other.reads if key.startswith("chunks/")} == {chunk_key(chunk.hash) for chunk in snapshot.chunks}
    await other.close()


async def test_where_no_store_has_a_byte_nothing_is_named(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    snapshot = await published(origin, remote, tmp_path)
    path = tmp_path / "remote" / chunk_key(snapshot.chunks[1].hash)
    path.write_bytes(b"!" + path.read_bytes()[1:])
    with pytest.raises(Altered, match=r"file://.*remote has other bytes under the name of .*: replace it from a whole copy"):
        await _pull(fresh, remote)
    with pytest.raises(NotFound):
        fresh.get("default", "small")


async def test_a_name_that_is_nowhere_is_not_found_and_a_store_that_is_away_is_not_empty(
    fresh: Store, remote: Watched, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match=r"no snapshot default/small on file://.*remote"):
        await _pull(fresh, remote)
    away = Directory(tmp_path / "away")
    with pytest.raises(Unreachable, match="mount it"):
        await _pull(fresh, remote, away)
    await away.close()


async def test_a_digest_is_had_whatever_the_name_stands_for(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    first = await published(origin, remote, tmp_path)
    second = await published(origin, remote, tmp_path, CONTENT + CONTENT)
    assert (await _pull(fresh, remote, digest=first.digest)).digest == first.digest != second.digest


async def test_what_a_stranger_signed_is_refused_before_a_byte_of_it_is_read(origin: Store, remote: Watched, tmp_path: Path) -> None:
    snapshot = await published(origin, remote, tmp_path)
    with node(tmp_path / "wary") as wary:
        del remote.reads[:]
        with pytest.raises(Untrusted, match=r"file://.*: the record of the name default/small: it is signed by key \w+, which is not"):
            await _pull(wary, remote)
        with pytest.raises(Untrusted, match=f"snapshot {snapshot.digest[:12]}: it is signed by key"):
            await _pull(wary, remote, digest=snapshot.digest)
        assert not [key for key in remote.reads if key.startswith("chunks/")]


async def test_what_is_not_signed_or_was_revoked_is_refused(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    snapshot = await published(origin, remote, tmp_path)
    fresh.keyring.revoke(origin.keyring.signing)
    with pytest.raises(Untrusted, match="was revoked"):
        await _pull(fresh, remote)
    (tmp_path / "remote" / signature_key(snapshot.digest)).unlink()
    with pytest.raises(Untrusted, match="it is not signed"):
        await _pull(fresh, remote, digest=snapshot.digest)


async def test_an_older_record_that_somebody_brought_back_is_refused(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    await published(origin, remote, tmp_path)
    path = tmp_path / "remote" / name_key("default", "small")
    old = path.read_bytes()
    await published(origin, remote, tmp_path, CONTENT + CONTENT)
    await _pull(fresh, remote)
    path.write_bytes(old)
    with pytest.raises(Replayed, match="number 1, and number 2 was seen here"):
        await _pull(fresh, remote, replace=True)


async def test_of_several_stores_the_newest_record_counts(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    await published(origin, remote, tmp_path)
    shutil.copytree(tmp_path / "remote", tmp_path / "stale")
    newer = await published(origin, remote, tmp_path, CONTENT + CONTENT)
    stale = Directory(tmp_path / "stale")
    assert (await _pull(fresh, stale, remote)).digest == newer.digest
    await stale.close()


async def test_a_snapshot_under_another_name_is_refused(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    snapshot = await published(origin, remote, tmp_path)
    puller = Puller(fresh, SeenNames(fresh.state), [remote])
    with pytest.raises(Untrusted, match="is default/small: somebody has moved the name"):
        await puller.pull("default", "other", snapshot.digest)


async def test_a_disk_without_room_says_so_before_anything_comes(
    origin: Store, fresh: Store, remote: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await published(origin, remote, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=70 << 20))
    with pytest.raises(Full, match="has 70 MiB free, and 10 MiB of the snapshot have to come"):
        await _pull(fresh, remote)
    assert not [key for key in remote.reads if key.startswith("chunks/")]


async def test_weights_of_which_a_layout_names_more_than_the_disk_holds_do_not_come(
    origin: Store, fresh: Store, remote: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest says how large they are, and the layout which chunks they have: nobody has compared the two."""
    await published(origin, remote, tmp_path)
    free = iter([1 << 40, 64 << 20])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    with pytest.raises(Full, match="has 64 MiB free"):
        await _pull(fresh, remote)
    assert fresh.list() == []


async def test_a_chunk_that_would_take_all_memory_is_not_asked_for(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    snapshot = await published(origin, remote, tmp_path)
    chunks = tuple(chunk.model_copy(update={"size": 1 << 40}) for chunk in snapshot.manifest.chunks)
    data = snapshot.manifest.model_copy(update={"chunks": chunks}).encode()
    digest = digest_of(data)
    await remote.put(manifest_key(digest), data)
    await remote.put(signature_key(digest), origin.keyring.sign(data).encode())
    del remote.reads[:]
    with pytest.raises(Corrupt, match=rf"{digest[:12]}: it names a chunk of more than 4194304 bytes"):
        await _pull(fresh, remote, digest=digest)
    assert not [key for key in remote.reads if key.startswith("chunks/")]


async def test_room_is_asked_for_what_has_to_come_alone(origin: Store, fresh: Store, remote: Watched, tmp_path: Path) -> None:
    asked: list[int] = []

    async def room(digest: str, size: int) -> None:
        asked.append(size)
        if len(asked) == 1:
            raise Full("no room")

    snapshot = await published(origin, remote, tmp_path, keep_model=True)
    puller = Puller(fresh, SeenNames(fresh.state), [remote], room=room)
    with pytest.raises(Full, match="no room"):
        await puller.pull("default", "small")
    assert not [key for key in remote.reads if key.startswith("chunks/")]
    await puller.pull("default", "small")
    files = sum(record.size for record in snapshot.manifest.files.values())
    assert asked == [len(CONTENT) + files] * 2, "the model is on this node"
