"""Snapshots that go from agent to agent: whole, with weights, while they come; and what is refused."""

from __future__ import annotations

import asyncio
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from restore_agent.sequences.travel import NoStore, Travel
from restore_agent.snapshots.catalog import NotFound, Snapshot
from restore_agent.snapshots.keyring import Untrusted
from restore_agent.transfer.complaints import Complaints
from restore_agent.transfer.exchange import NoPeers, OtherAgent
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.source import Denied
from tests.worlds.certificates import Authority
from tests.worlds.peers import fleet_files
from tests.worlds.travelling import HEADER, WEIGHTS, node, sharing, take
from zerowake_shared.tls import TlsFiles

FLEET = Authority("fleet")


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return fleet_files(tmp_path / "tls", FLEET)


def _ignored(progress: Progress) -> None:
    """Nobody looks at it."""


async def fetched(
    travel: Travel,
    snapshot: Snapshot,
    *others: OtherAgent,
    namespace: str = "default",
    urls: tuple[str, ...] = (),
    complaints: Complaints | None = None,
) -> Snapshot:
    digest = snapshot.digest
    return await travel.pull(namespace, "small", digest, urls, _ignored, replace=False, others=others, complaints=complaints)


async def test_from_one_that_has_it_with_its_weights(tmp_path: Path, tls: TlsFiles) -> None:
    """It has fetched them itself: on one machine both nodes would see the model's own folder."""
    (tmp_path / "remote").mkdir()
    with node(tmp_path / "zero") as zero, node(tmp_path / "one", zero) as one, node(tmp_path / "two", zero) as two:
        snapshot = take(zero, tmp_path / "model")
        await Travel(zero, lambda snapshot: None).push(snapshot, f"file://{tmp_path}/remote", _ignored)
        shutil.rmtree(tmp_path / "model")
        with sharing(one, "one", tls) as (first, there), sharing(two, "two", tls) as (second, _):
            await fetched(first, snapshot, urls=(f"file://{tmp_path}/remote",))
            shutil.rmtree(tmp_path / "remote")
            got = await fetched(second, snapshot, there)
        assert {each.name: each.fault for each in second.sources} == {f"agent {there.address}": ""}
        two.verify(got)
        [region] = two.regions(got)
        assert region.folder == two.fetched_weights(region.record)
        assert (region.folder / "model.safetensors").read_bytes()[HEADER:] == WEIGHTS


async def test_one_that_fetches_it_gives_it_to_another_meanwhile(tmp_path: Path, tls: TlsFiles) -> None:
    """The third is not told of the first."""
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two, node(tmp_path / "three", one) as three:
        snapshot = take(one, tmp_path / "model")
        with (
            sharing(one, "one", tls) as (_, first),
            sharing(two, "two", tls) as (second_travel, second),
            sharing(three, "three", tls) as (third_travel, third),
        ):
            waits: asyncio.Event = asyncio.Event()

            async def third_fetches() -> Snapshot:
                await waits.wait()
                return await fetched(third_travel, snapshot, replace(second, complete=False))

            fetching = asyncio.create_task(third_fetches())

            def begun(progress: Progress) -> None:
                waits.set()

            others = (first, replace(third, complete=False))
            mine = await second_travel.pull("default", "small", snapshot.digest, (), begun, replace=False, others=others)
            three.verify(await fetching)
            two.verify(mine)


async def test_a_store_is_read_once_for_all(tmp_path: Path, tls: TlsFiles) -> None:
    (tmp_path / "remote").mkdir()
    url = f"file://{tmp_path}/remote"
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two, node(tmp_path / "three", one) as three:
        snapshot = take(one, tmp_path / "model")
        await Travel(one, lambda snapshot: None).push(snapshot, url, _ignored)
        with sharing(two, "two", tls) as (second, there), sharing(three, "three", tls) as (third, here):
            both = (replace(there, complete=False), replace(here, complete=False))
            got = await asyncio.gather(*(fetched(travel, snapshot, *both, urls=(url,)) for travel in (second, third)))
        two.verify(got[0])
        three.verify(got[1])


async def test_one_that_serves_other_bytes_is_left_and_named(tmp_path: Path, tls: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zerowake.agent")  # the caller tells it as a warning
    (tmp_path / "remote").mkdir()
    url = f"file://{tmp_path}/remote"
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        snapshot = take(one, tmp_path / "model")
        await Travel(one, lambda snapshot: None).push(snapshot, url, _ignored)
        for chunk in snapshot.manifest.chunks:
            path = one.chunks.path(chunk.hash)
            path.chmod(0o600)
            path.write_bytes(bytes(chunk.size))
        complaints = Complaints()
        with sharing(one, "one", tls) as (_, there), sharing(two, "two", tls) as (travel, _):
            two.verify(await fetched(travel, snapshot, there, urls=(url,), complaints=complaints))
        [text] = complaints.texts
        assert f"agent {there.address}" in text and "other bytes" in text and text.endswith("more of it)")
        assert text in caplog.text


async def test_what_the_other_ones_key_has_signed_alone_is_not_taken(tmp_path: Path, tls: TlsFiles) -> None:
    with node(tmp_path / "one") as one, node(tmp_path / "two") as two:
        snapshot = take(one, tmp_path / "model")
        refused = pytest.raises(Untrusted, match=r"signed by key .* which is not trusted here")
        with sharing(one, "one", tls) as (_, there), sharing(two, "two", tls) as (travel, _), refused:
            await fetched(travel, snapshot, there)
        assert two.list() == []


async def test_a_namespace_does_not_get_another_ones_snapshot_by_its_digest(tmp_path: Path, tls: TlsFiles) -> None:
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        snapshot = take(one, tmp_path / "model")
        refused = pytest.raises(Denied, match=r"is not of namespace others")
        with sharing(one, "one", tls) as (_, there), sharing(two, "two", tls) as (travel, _), refused:
            await fetched(travel, snapshot, there, namespace="others")
        assert two.list() == []


async def test_who_has_another_one_is_said_to_have_none(tmp_path: Path, tls: TlsFiles) -> None:
    with node(tmp_path / "one") as one, node(tmp_path / "two", one) as two:
        snapshot = take(one, tmp_path / "model")
        one.remove("default", "small")
        none = pytest.raises(NotFound, match=r"on agent 127\.0\.0\.1")
        with sharing(one, "one", tls) as (_, there), sharing(two, "two", tls) as (travel, _), none:
            await fetched(travel, snapshot, there)


async def test_an_agent_that_exchanges_nothing_says_so(tmp_path: Path) -> None:
    with node(tmp_path / "one") as one:
        travel, other = Travel(one, lambda snapshot: None), OtherAgent("two", "127.0.0.1:1", complete=True)
        with pytest.raises(NoPeers, match="started without --peers"):
            await travel.pull("default", "small", "0" * 64, (), _ignored, replace=False, others=[other])
        with pytest.raises(NoStore, match="or name other agents and a digest"):
            await travel.pull("default", "small", "", (), _ignored, replace=False, others=[other])
