"""A node is deleted while another fetches from it the only copy that stands on any node: with a store that has it, too, and without one.
And what it has goes, when it is back, if nobody asks for that any more.

The other agents together get so little a second from an agent that a fetch takes half a minute (`agent.peerRate`). It is in the middle when
some chunks have come and others have not: then the power of the node that gives them is cut, and Kubernetes forgets the node.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.api import Object
from tests.e2e.cluster.control import enter
from tests.e2e.cluster.layout import NODE, SECOND_NODE, Addresses
from tests.e2e.release import Release, cordoned, deployment, is_ready, snapshot
from tests.e2e.restored_pods import how_it_began, pod_of
from tests.e2e.travelling import ON_A_NODE, WITHIN, answer, deleted, forgets_pods, lands, places, release_with_stores, said
from tests.worlds.alerting import alerting
from tests.worlds.s3_server import S3Server, s3_server

pytestmark = [
    pytest.mark.own_cluster("ends nodes and starts them again, and has an S3 server on this machine"),
    pytest.mark.usefixtures("images", "reported"),
    pytest.mark.asyncio(loop_scope="module"),
]
URL = "s3://models/here"
RATE = "6MiB"  # a second: a chunk of four takes so long that a second look sees it come, and not so long that its source is left as slow
GRACE = 5  # seconds for which nobody asks for what a node has before it goes
# Of an engine that waits three quarters of a minute for somebody else before it is ready, on any machine: one that downloads its model.
SLOW = "import time, runpy; time.sleep(45); runpy.run_path('/server.py')"
CHUNKS = "find /var/lib/zerowake -path '*/chunks/*' -name '????????????????????????????????????????????????????????????????'"


@pytest.fixture(scope="module")
def server(addresses: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3"), addresses.machine) as server:
        server.make_bucket("models")
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(kubeconfig: str, images: None, server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Release]:
    options = f"--set=agent.peerRate={RATE},agent.orphanGraceSeconds={GRACE}"
    async with release_with_stores(kubeconfig, "cut-fetches", server, tmp_path_factory.mktemp("keys"), options, plain=True) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WITHIN, sock_connect=5)) as session:
        yield session


async def chunks_on(node: str) -> dict[str, str]:
    """Hash → which file of the disk it is, and since when."""
    command = [*enter(node), "sh", "-c", f"{CHUNKS} -printf '%f %i %T@\\n'"]
    found = (await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)).stdout
    return dict(line.split(" ", 1) for line in found.splitlines())


async def captured(made: Release, name: str, mebibytes: int, *, store: str = "", **container: object) -> tuple[str, set[str]]:
    """On the second node alone, and with so much memory of its own; the digest, and the chunks that are its own, too."""
    before = await chunks_on(SECOND_NODE)
    of, served = snapshot(name), deployment(name, of=name)
    (serving,) = served["spec"]["template"]["spec"]["containers"]
    serving |= {"args": ["8000", str(mebibytes), "/mapped"], **container}
    engine = {key: value for key, value in serving.items() if key != "readinessProbe"}
    of["spec"] |= {"template": {"spec": {"containers": [engine]}}} | ({"store": store} if store else {})
    async with cordoned(made, NODE):
        await made.api.apply(of, served, namespace=made.namespace)
        found = await made.api.until("ModelSnapshot", made.namespace, name, is_ready, WITHIN)
    if store:
        found = await made.api.until("ModelSnapshot", made.namespace, name, lambda one: said(one, "Stored")[0] == "True", WITHIN)
    assert found and places(found).keys() - {URL} == {SECOND_NODE}
    return found["status"]["digest"], (await chunks_on(SECOND_NODE)).keys() - before.keys()


async def forgotten(made: Release, name: str, chunks: set[str]) -> None:
    """It is on no node any more, nor are its chunks: the next model has memory of the same content. The node that went is back."""
    await made.api.until("ModelSnapshot", made.namespace, name, lambda one: {NODE, SECOND_NODE} <= places(one).keys(), WITHIN)
    await made.api.delete("ModelSnapshot", made.namespace, name)
    await made.api.until("ModelSnapshot", made.namespace, name, lambda one: one is None, WITHIN)
    async with asyncio.timeout(WITHIN):
        while any([chunks & (await chunks_on(node)).keys() for node in (NODE, SECOND_NODE)]):
            await asyncio.sleep(0.2)


async def in_the_middle(wanted: set[str], share: float = 0.0) -> dict[str, str]:
    """What has come of these chunks to the first node, when some have, or such a share of them, and not all."""
    async with asyncio.timeout(WITHIN):
        while True:
            there = {name: file for name, file in (await chunks_on(NODE)).items() if name in wanted}
            if len(there) > share * len(wanted):
                assert there.keys() < wanted, "all of it has come: it was no moment in the middle"
                return there
            await asyncio.sleep(0.2)  # a folder of another node tells nobody that it grew


async def events_of(made: Release, one: Object) -> dict[str, str]:
    """Reason → the newest note about the object."""
    every = await made.api.list("Event", made.namespace)
    return {each["reason"]: each["message"] for each in every if each["involvedObject"].get("uid") == one["metadata"]["uid"]}


async def test_whoever_is_on_call_hears_of_a_fetch_that_takes_too_long(installed: Release, tmp_path: Path) -> None:
    """By a real Prometheus that reads the scaler's pods."""
    pages = [f"{pod['status']['podIP']}:9090" for pod in await installed.pods("zerowake-scaler")]
    async with alerting(tmp_path / "prometheus", *pages) as alerts:
        _, wanted = await captured(installed, "late", 96)
        async with cordoned(installed, SECOND_NODE):
            await alerts.fires("ZerowakeStagingBehind")
            await installed.api.until("ModelSnapshot", installed.namespace, "late", lambda one: places(one).get(NODE) in ON_A_NODE, WITHIN)
            await alerts.is_quiet("ZerowakeStagingBehind")
    await forgotten(installed, "late", wanted)


async def test_what_has_come_stays_and_the_rest_comes_from_the_store(
    installed: Release, client: aiohttp.ClientSession, server: S3Server
) -> None:
    api, namespace = installed.api, installed.namespace
    digest, wanted = await captured(installed, "kept", 128, store=URL)
    async with cordoned(installed, SECOND_NODE):
        came = await in_the_middle(wanted)
        async with deleted(installed, SECOND_NODE):
            found = await api.until("ModelSnapshot", namespace, "kept", lambda one: places(one).get(NODE) in ON_A_NODE, WITHIN)
            assert found and found["status"]["digest"] == digest, "another digest would be another capture"
            there = await chunks_on(NODE)
            assert there.keys() >= wanted and {name: there[name] for name in came} == came, "what had come was not fetched anew"
            gets = [line for line in server.accesses.splitlines() if "s3_GetObject" in line]  # puts are told late
            read = {name for name in wanted if any(f"chunks/{name[:2]}/{name}" in line for line in gets)}
            print(f"{len(came)} of {len(wanted)} chunks had come when the node went; {len(read)} were read from the store")
            assert read
            await forgets_pods(installed, SECOND_NODE)
            await lands(installed, client, "kept", NODE)
    await forgotten(installed, "kept", wanted)


async def test_a_pod_that_comes_first_waits_for_its_snapshot(installed: Release, client: aiohttp.ClientSession) -> None:
    """Its engine takes longer to start than its snapshot to come, also where the node that gives it goes in the middle."""
    digest, wanted = await captured(installed, "awaited", 48, store=URL, command=["python3", "-c", SLOW])
    async with cordoned(installed, SECOND_NODE):
        await installed.scaled("awaited", minReplicaCount=1)
        await in_the_middle(wanted, 0.5)
        async with deleted(installed, SECOND_NODE):
            assert len(await answer(installed, client, "awaited")) == 64
            pod = await pod_of(installed, "awaited")
            began = await how_it_began(installed, pod, WITHIN)
            print(began)
            assert (pod["spec"]["nodeName"], began.partition(":")[0]) == (NODE, "Restored") and digest[:12] in began and "fetch" in began
            assert "Fetching" in await events_of(installed, pod)
            await installed.scaled("awaited")
            await installed.at_zero("awaited")
    await forgotten(installed, "awaited", wanted)


async def test_without_a_store_its_pods_start_cold_until_it_is_captured_again(installed: Release, client: aiohttp.ClientSession) -> None:
    api, namespace = installed.api, installed.namespace
    digest, wanted = await captured(installed, "bare", 128)

    def is_captured_again(one: Object | None) -> bool:
        return bool(one) and is_ready(one) and (one or {})["status"]["digest"] != digest and places(one).keys() == {NODE}

    await installed.scaled("bare")
    async with cordoned(installed, SECOND_NODE):
        await in_the_middle(wanted)
        async with deleted(installed, SECOND_NODE):
            await installed.scaled("bare", minReplicaCount=1)  # kept while it is looked at
            assert len(await answer(installed, client, "bare")) == 64
            pod = await pod_of(installed, "bare")
            assert pod["spec"]["nodeName"] == NODE and "Restored" not in await events_of(installed, pod)
            await installed.scaled("bare")
            found = await api.until("ModelSnapshot", namespace, "bare", is_captured_again, WITHIN)
            assert found
            print(await events_of(installed, found))
            await installed.at_zero("bare")
            await lands(installed, client, "bare", NODE)


async def test_what_a_node_has_goes_when_it_is_back_if_its_object_was_deleted_meanwhile(installed: Release) -> None:
    """There is another object all the while: no list is empty."""
    api, namespace = installed.api, installed.namespace
    await api.apply(snapshot("other") | {"spec": {"artifact": {"name": "none", "digest": "0" * 64}}}, namespace=namespace)
    digest, wanted = await captured(installed, "away", 48)
    await installed.scaled("away")
    await installed.at_zero("away")
    there = await chunks_on(SECOND_NODE)
    assert wanted and wanted <= there.keys()
    async with deleted(installed, SECOND_NODE):
        await api.delete("ModelSnapshot", namespace, "away")
        await api.until("ModelSnapshot", namespace, "away", lambda one: one is None, WITHIN)
    async with asyncio.timeout(WITHIN):
        while wanted & (await chunks_on(SECOND_NODE)).keys():
            await asyncio.sleep(0.2)
        while not any(
            digest[:12] in each.get("message", "") for each in await api.list("Event", "default") if each["reason"] == "OrphanRemoved"
        ):
            await asyncio.sleep(0.2)  # it is written after the removal
