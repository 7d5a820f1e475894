"""Snapshots in a bucket: what was captured on one node comes from there to another, which never ran the model.

The server is the Versity gateway, on this machine, and each agent speaks to it with the credentials of the chart's Secret. The
holder is lost by the end of its power, and by taking the snapshot off each node.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.api import Object
from tests.e2e.cluster.layout import NODE, SECOND_NODE, Addresses
from tests.e2e.release import Release, cordoned, deployment, is_ready
from tests.e2e.travelling import ON_A_NODE, WITHIN, answer, lands, places, release_with_stores, said, stored, without_power
from tests.worlds.s3_server import S3Server, s3_server

pytestmark = [
    pytest.mark.own_cluster("has an S3 server on this machine"),
    pytest.mark.usefixtures("images", "reported"),
    pytest.mark.asyncio(loop_scope="module"),
]
MODEL, URL = "stored", "s3://models/here"


@pytest.fixture(scope="module")
def server(addresses: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3"), addresses.machine) as server:
        server.make_bucket("models")
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(kubeconfig: str, images: None, server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Release]:
    async with release_with_stores(kubeconfig, "stores", server, tmp_path_factory.mktemp("keys")) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WITHIN, sock_connect=5)) as session:
        yield session


async def followed(made: Release, holds: Callable[[Object | None], object]) -> asyncio.Task[Object | None]:
    """The ModelSnapshot, once `holds` is true of it: it is watched before this returns, so that no state that passes is missed."""
    watched = asyncio.Event()

    def look(one: Object | None) -> object:
        watched.set()
        return holds(one)

    task = asyncio.create_task(made.api.until("ModelSnapshot", made.namespace, MODEL, look, WITHIN))
    async with asyncio.timeout(WITHIN):
        await watched.wait()
    return task


async def test_when_its_node_is_gone_another_has_it_from_the_bucket(
    installed: Release, client: aiohttp.ClientSession, server: S3Server
) -> None:
    """Its power is cut; the process that answers on the other node is one that was dumped on the first."""
    api, namespace = installed.api, installed.namespace
    async with cordoned(installed, NODE):
        await api.apply(stored(MODEL, URL), deployment(MODEL, of=MODEL), namespace=namespace)
        await api.until("ModelSnapshot", namespace, MODEL, is_ready, WITHIN)
    found = await api.until("ModelSnapshot", namespace, MODEL, lambda one: said(one, "Stored")[0] == "True", WITHIN)
    assert found
    (kept,) = [each for each in found["status"]["locations"] if each["rung"] == "store"]
    assert (kept["name"], kept["digest"]) == (URL, found["status"]["digest"])
    assert json.loads((server.root / "models/here/store.json").read_text())["encryption"], "nobody had to ask for that"
    assert places(found).keys() == {SECOND_NODE, URL}, "the other node took no pods when it was captured"
    async with without_power(installed, SECOND_NODE):
        after = await api.until("ModelSnapshot", namespace, MODEL, lambda one: places(one).get(NODE) in ON_A_NODE, WITHIN)
        assert after and after["status"]["digest"] == found["status"]["digest"], "another digest would be another capture"
        await lands(installed, client, MODEL, NODE)


async def test_what_every_node_has_lost_is_fetched_and_not_captured(installed: Release, client: aiohttp.ClientSession) -> None:
    api, namespace = installed.api, installed.namespace
    found = await api.until(
        "ModelSnapshot",
        namespace,
        MODEL,
        lambda one: all(places(one).get(node) in ON_A_NODE for node in (NODE, SECOND_NODE)),
        WITHIN,
    )
    before = await lands(installed, client, MODEL, SECOND_NODE)
    lost = await followed(installed, lambda one: said(one, "Ready")[0] == "False")
    for node in (NODE, SECOND_NODE):
        await installed.take_off(node, MODEL)
    await lost
    after = await api.until("ModelSnapshot", namespace, MODEL, is_ready, WITHIN)
    assert found and after and after["status"]["digest"] == found["status"]["digest"] and URL in places(after)
    (node,) = places(after).keys() - {URL}
    assert await lands(installed, client, MODEL, node) == before


async def test_a_model_snapshot_that_is_made_anew_finds_its_snapshot_in_the_bucket(
    installed: Release, client: aiohttp.ClientSession
) -> None:
    """As in another cluster, or after a re-install: no node has it, no capture pod is made, and its pod is restored."""
    api, namespace = installed.api, installed.namespace
    before = await api.until("ModelSnapshot", namespace, MODEL, is_ready, WITHIN)
    answered = await lands(installed, client, MODEL, next(iter(places(before).keys() - {URL})))
    await api.delete("ModelSnapshot", namespace, MODEL)
    await api.until("ModelSnapshot", namespace, MODEL, lambda one: one is None, WITHIN)
    for node in (NODE, SECOND_NODE):
        assert MODEL not in (await installed.on_agent(node, "list")).split()
    await api.apply(stored(MODEL, URL), namespace=namespace)
    after = await api.until("ModelSnapshot", namespace, MODEL, is_ready, WITHIN)
    assert before and after and after["status"]["digest"] == before["status"]["digest"], "another digest would be another capture"
    assert said(after, "Stored")[0] == said(after, "Captured")[0] == "True"
    events = await api.list("Event", namespace)
    reasons = {one["reason"] for one in events if one["involvedObject"].get("uid") == after["metadata"]["uid"]}
    assert "Found" in reasons and "Captured" not in reasons
    (node,) = places(after).keys() - {URL}
    assert await lands(installed, client, MODEL, node) == answered


async def test_a_store_that_denies_costs_the_model_nothing(installed: Release, client: aiohttp.ClientSession, server: S3Server) -> None:
    """No bucket of that name is there for these credentials: the condition and an event say so, and the model is restored as ever."""
    api, namespace = installed.api, installed.namespace
    await api.apply(stored("denied", "s3://nowhere/at-all"), deployment("denied", of="denied"), namespace=namespace)

    def is_ready_and_not_stored(one: Object | None) -> bool:
        status, reason, _ = said(one, "Stored")
        return is_ready(one) and status == "False" and reason in ("Denied", "Unreachable")

    await api.until("ModelSnapshot", namespace, "denied", is_ready_and_not_stored, WITHIN)
    await installed.scaled("denied")
    assert len(await answer(installed, client, "denied")) == 64
