"""Snapshots in a bucket: what was captured on one node comes from there to another, which never ran the model.

The server is the Versity gateway, on this machine, and each agent speaks to it with the credentials of the chart's Secret. The
holder is lost by the end of its power, and by taking the snapshot off each node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import pytest
import pytest_asyncio

from restore_agent.snapshots.keyring import Keyring
from tests.e2e.api import Api, Object, condition
from tests.e2e.cluster.layout import NODE, SECOND_NODE, Addresses
from tests.e2e.cluster.power import boot, crash
from tests.e2e.release import Release, cordoned, deployment, is_ready, own_namespace, snapshot, to_install
from tests.e2e.restored_pods import beginning, pod_of
from tests.worlds.s3_server import S3Server, s3_server

pytestmark = [
    pytest.mark.own_cluster("has an S3 server on this machine"),
    pytest.mark.usefixtures("images", "reported"),
    pytest.mark.asyncio(loop_scope="module"),
]
MODEL, URL = "stored", "s3://models/here"
WITHIN = 240.0  # generous: a node that lost its power is missed after 40 s
ON_A_NODE = ("disk", "memory")


@pytest.fixture(scope="module")
def server(addresses: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3"), addresses.machine) as server:
        server.make_bucket("models")
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(kubeconfig: str, images: None, server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Release]:
    """With keys that both nodes trust, and credentials for the server."""
    keys = tmp_path_factory.mktemp("keys")
    Keyring(keys).make()
    async with Api.connect(kubeconfig) as api, own_namespace(api, "stores") as namespace, to_install(api, kubeconfig, namespace) as made:
        create = ("kubectl", "-n", namespace, "create", "secret", "generic")
        await made.run(*create, "zerowake-keys", f"--from-file={keys}/signing.pem")
        await made.run(*create, "zerowake-stores", *(f"--from-literal={name}={value}" for name, value in server.environment().items()))
        await made.helm_upgrade("--set=agent.keysSecret=zerowake-keys,agent.stores.secret=zerowake-stores")
        await made.find_gateway()
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WITHIN, sock_connect=5)) as session:
        yield session


def stored(name: str, url: str) -> Object:
    made = snapshot(name)
    made["spec"]["store"] = url
    return made


def said(one: Object | None, kind: str) -> tuple[str, str, str]:
    """Status, reason and message of a condition."""
    conditions = ((one or {}).get("status") or {}).get("conditions", [])
    found: dict[str, str] = next((each for each in conditions if each["type"] == kind), {})
    return found.get("status", ""), found.get("reason", ""), found.get("message", "")


def places(one: Object | None) -> dict[str, str]:
    """Where it is → rung."""
    return {each["name"]: each["rung"] for each in ((one or {}).get("status") or {}).get("locations", [])}


async def answer(made: Release, client: aiohttp.ClientSession, model: str) -> str:
    """Also while the Service of the gateway still sends connections to a node that is gone."""
    async with asyncio.timeout(WITHIN):
        while True:
            try:
                found: str = (await made.ask(client, model))["digest"]
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.5)  # no object says what each node's rules are by now
            else:
                return found


async def lands(made: Release, client: aiohttp.ClientSession, node: str) -> str:
    """The answer of a pod that was restored on the node, from a process that had answered before it was dumped. Then it is at zero again.

    It is kept while it is looked at: the scaling may otherwise end it in the moment in which it has answered.
    """
    async with cordoned(made, *({NODE, SECOND_NODE} - {node})):
        await made.scaled(MODEL, minReplicaCount=1)
        try:
            found = await answer(made, client, MODEL)
            pod = await pod_of(made, MODEL)
            assert (pod["spec"]["nodeName"], await beginning(made, pod, WITHIN)) == (node, "Restored")
            async with client.get(f"http://{pod['status']['podIP']}:8000/count") as counted:
                assert (await counted.json())["count"] > 1, "it had answered before it was dumped"
            return found
        finally:
            await made.scaled(MODEL)
            await made.at_zero(MODEL)


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


@contextlib.asynccontextmanager
async def without_power(made: Release, name: str) -> AsyncIterator[None]:
    """From the moment in which Kubernetes has noticed: no pod is sent there. Afterwards all is as before, and the model is at zero."""
    await asyncio.to_thread(crash, name)
    try:
        await made.api.until("Node", "", name, is_missed, WITHIN)
        yield
    finally:
        await asyncio.to_thread(boot, name)
        await made.api.until("Node", "", name, lambda one: condition(one, "Ready") and not is_missed(one), WITHIN)
        for each in ("deployment/zerowake-scaler", "daemonset/zerowake-agent"):
            await made.run("kubectl", "-n", made.namespace, "rollout", "status", each, f"--timeout={WITHIN:.0f}s")


def is_missed(node: Object | None) -> bool:
    return any(each["key"] == "node.kubernetes.io/unreachable" for each in ((node or {}).get("spec") or {}).get("taints") or [])


async def test_when_its_node_is_gone_another_has_it_from_the_bucket(installed: Release, client: aiohttp.ClientSession) -> None:
    """Its power is cut; the process that answers on the other node is one that was dumped on the first."""
    api, namespace = installed.api, installed.namespace
    async with cordoned(installed, NODE):
        await api.apply(stored(MODEL, URL), deployment(MODEL, of=MODEL), namespace=namespace)
        await api.until("ModelSnapshot", namespace, MODEL, is_ready, WITHIN)
    found = await api.until("ModelSnapshot", namespace, MODEL, lambda one: said(one, "Stored")[0] == "True", WITHIN)
    assert found
    (kept,) = [each for each in found["status"]["locations"] if each["rung"] == "store"]
    assert (kept["name"], kept["digest"]) == (URL, found["status"]["digest"])
    assert places(found).keys() == {SECOND_NODE, URL}, "the other node took no pods when it was captured"
    async with without_power(installed, SECOND_NODE):
        after = await api.until("ModelSnapshot", namespace, MODEL, lambda one: places(one).get(NODE) in ON_A_NODE, WITHIN)
        assert after and after["status"]["digest"] == found["status"]["digest"], "another digest would be another capture"
        await lands(installed, client, NODE)


async def test_what_every_node_has_lost_is_fetched_and_not_captured(installed: Release, client: aiohttp.ClientSession) -> None:
    api, namespace = installed.api, installed.namespace
    found = await api.until(
        "ModelSnapshot",
        namespace,
        MODEL,
        lambda one: all(places(one).get(node) in ON_A_NODE for node in (NODE, SECOND_NODE)),
        WITHIN,
    )
    before = await lands(installed, client, SECOND_NODE)
    lost = await followed(installed, lambda one: said(one, "Ready")[0] == "False")
    for node in (NODE, SECOND_NODE):
        await installed.take_off(node, MODEL)
    await lost
    after = await api.until("ModelSnapshot", namespace, MODEL, is_ready, WITHIN)
    assert found and after and after["status"]["digest"] == found["status"]["digest"] and URL in places(after)
    (node,) = places(after).keys() - {URL}
    assert await lands(installed, client, node) == before


async def test_a_model_snapshot_that_is_made_anew_finds_its_snapshot_in_the_bucket(
    installed: Release, client: aiohttp.ClientSession
) -> None:
    """As in another cluster, or after a re-install: no node has it, no capture pod is made, and its pod is restored."""
    api, namespace = installed.api, installed.namespace
    before = await api.until("ModelSnapshot", namespace, MODEL, is_ready, WITHIN)
    answered = await lands(installed, client, next(iter(places(before).keys() - {URL})))
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
    assert await lands(installed, client, node) == answered


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
