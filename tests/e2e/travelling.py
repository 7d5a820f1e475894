"""Snapshots on their way between nodes and stores: what their ModelSnapshots say of it, pods that are restored where one has come,
and nodes that are gone meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from tests.e2e.api import Api, Object, condition
from tests.e2e.cluster.layout import NODE, SECOND_NODE
from tests.e2e.cluster.power import boot, crash
from tests.e2e.release import Release, cordoned, own_namespace, snapshot, to_install
from tests.e2e.restored_pods import beginning, pod_of, webhook_leads
from tests.worlds.s3_server import S3Server

WITHIN = 240.0  # generous: a node that lost its power is missed after 40 s
ON_A_NODE = ("disk", "memory")


@contextlib.asynccontextmanager
async def release_with_stores(
    kubeconfig: str, stem: str, server: S3Server, keys: Path, *options: str, plain: bool = False
) -> AsyncIterator[Release]:
    """With keys that all nodes trust, and encrypt by unless their store is to be plain, and credentials for the server. `keys`: an empty
    folder."""
    Keyring(keys).make()
    if not plain:
        EncryptionKeys(keys).make()
    async with Api.connect(kubeconfig) as api, own_namespace(api, stem) as namespace, to_install(api, kubeconfig, namespace) as made:
        create = ("kubectl", "-n", namespace, "create", "secret", "generic")
        await made.run(*create, "zerowake-keys", *(f"--from-file={file}" for file in keys.iterdir() if file.is_file()))
        await made.run(*create, "zerowake-stores", *(f"--from-literal={name}={value}" for name, value in server.environment().items()))
        stores = f"agent.stores.secret=zerowake-stores,agent.stores.plain={str(plain).lower()}"
        await made.helm_upgrade(f"--set=agent.keysSecret=zerowake-keys,{stores}", *options)
        await made.find_gateway()
        yield made


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


async def lands(made: Release, client: aiohttp.ClientSession, model: str, node: str) -> str:
    """The answer of a pod that was restored on the node, from a process that had answered before it was dumped. Then it is at zero again.

    It is kept while it is looked at: the scaling may otherwise end it in the moment in which it has answered.
    """
    there = {one["metadata"]["name"] for one in await made.api.list("Node")}
    async with cordoned(made, *(({NODE, SECOND_NODE} & there) - {node})):
        await webhook_leads(made, model)
        await made.scaled(model, minReplicaCount=1)
        try:
            found = await answer(made, client, model)
            pod = await pod_of(made, model)
            assert (pod["spec"]["nodeName"], await beginning(made, pod, WITHIN)) == (node, "Restored")
            async with client.get(f"http://{pod['status']['podIP']}:8000/count") as counted:
                assert (await counted.json())["count"] > 1, "it had answered before it was dumped"
            return found
        finally:
            await made.scaled(model)
            await made.at_zero(model)


@contextlib.asynccontextmanager
async def without_power(made: Release, name: str) -> AsyncIterator[None]:
    """From the moment in which Kubernetes has noticed: no pod is sent there. Afterwards all is as before, and the model is at zero."""
    async with powerless(made, name):
        await made.api.until("Node", "", name, is_missed, WITHIN)
        yield


@contextlib.asynccontextmanager
async def deleted(made: Release, name: str) -> AsyncIterator[None]:
    """Its power is lost, and Kubernetes is told that it will not come back. Afterwards it has come, as a new node of that name."""
    async with powerless(made, name):
        await made.api.delete("Node", "", name)
        await made.api.until("Node", "", name, lambda one: one is None, WITHIN)
        yield


async def forgets_pods(made: Release, node: str) -> None:
    """Of a node that was deleted, and its Services their addresses. Until then the webhook may be asked there, in vain: it marks no pod,
    and none that is not is restored."""
    async with asyncio.timeout(WITHIN):
        while await _remembers(made, node):
            await asyncio.sleep(0.5)  # pods are many: they are listed


async def _remembers(made: Release, node: str) -> bool:
    pods = [each["spec"].get("nodeName") for each in await made.api.list("Pod", made.namespace)]
    slices = await made.api.list("EndpointSlice", made.namespace)
    return node in [*pods, *(end.get("nodeName") for each in slices for end in each.get("endpoints") or ())]


@contextlib.asynccontextmanager
async def powerless(made: Release, name: str) -> AsyncIterator[None]:
    await asyncio.to_thread(crash, name)
    try:
        yield
    finally:
        await asyncio.to_thread(boot, name)
        await made.api.until("Node", "", name, lambda one: condition(one, "Ready") and not is_missed(one), WITHIN)
        for each in ("deployment/zerowake-scaler", "daemonset/zerowake-agent"):
            await made.run("kubectl", "-n", made.namespace, "rollout", "status", each, f"--timeout={WITHIN:.0f}s")


def is_missed(node: Object | None) -> bool:
    return any(each["key"] == "node.kubernetes.io/unreachable" for each in ((node or {}).get("spec") or {}).get("taints") or [])
