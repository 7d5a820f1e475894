"""Several nodes, each with its kubelet, its containerd and its agent: where pods go, and what happens when a node leaves and comes back.

The release has a gateway and an agent on each of two nodes, and a model that was captured on each. What a node has is known by the word of
its agent; a node that loses its power says nothing any more, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from restore_agent.snapshots.encryption_keys import EncryptionKeys
from restore_agent.snapshots.keyring import Keyring
from tests.e2e.api import Api, Object, condition
from tests.e2e.cluster.control import enter, tell
from tests.e2e.cluster.layout import NODE, SECOND_NODE
from tests.e2e.cluster.power import boot, crash
from tests.e2e.release import Release, cordoned, deployment, is_ready, own_namespace, snapshot, to_install
from tests.e2e.restored_pods import beginning, pod_of, ready_pod

pytestmark = [
    pytest.mark.own_cluster("ends nodes and starts them again"),
    pytest.mark.usefixtures("images", "reported"),
    pytest.mark.asyncio(loop_scope="module"),
]
NODES = (NODE, SECOND_NODE)
CAPTURED_ON = {"one": NODE, "two": SECOND_NODE}  # model → node
WITHIN = 120.0
ON_A_NODE = ("disk", "memory")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(kubeconfig: str, images: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Release]:
    """Each model's capture is bound to a node; nothing but the snapshot binds the model to it afterwards."""
    keys = tmp_path_factory.mktemp("keys")
    Keyring(keys).make()
    EncryptionKeys(keys).make()
    async with (
        Api.connect(kubeconfig) as api,
        own_namespace(api, "nodes") as namespace,
        to_install(api, kubeconfig, namespace) as made,
    ):
        secret = ("create", "secret", "generic", "zerowake-keys", f"--from-file={keys}/signing.pem", f"--from-file={keys}/encryption.key")
        await made.run("kubectl", "-n", namespace, *secret)
        await made.helm_upgrade("--set=agent.keysSecret=zerowake-keys")
        await made.find_gateway()
        for model, node in CAPTURED_ON.items():
            of = snapshot(model)
            of["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
            await api.apply(of, movable(model), namespace=namespace)
            await api.until("ModelSnapshot", namespace, model, is_ready, WITHIN)
        for model in CAPTURED_ON:
            await made.scaled(model)
        yield made


def movable(model: str) -> Object:
    """Its pods leave a node at once that is not heard of, and not after the usual five minutes."""
    made = deployment(model, of=model)
    gone = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}
    made["spec"]["template"]["spec"]["tolerations"] = [gone]
    return made


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WITHIN)) as session:
        yield session


async def told(made: Release, model: str, holds: Callable[[dict[str, str]], object]) -> dict[str, str]:
    """Node → rung, once `holds` is true of it, by the model's ModelSnapshot."""

    def rungs(one: Object | None) -> dict[str, str]:
        return {each["name"]: each["rung"] for each in ((one or {}).get("status") or {}).get("locations", [])}

    found = await made.api.until("ModelSnapshot", made.namespace, model, lambda one: one and holds(rungs(one)), WITHIN)
    return rungs(found)


async def alone(made: Release, model: str) -> None:
    """What another node has fetched, as the model's own took no pods, goes again, so that the next test begins as this one did."""
    node = CAPTURED_ON[model]
    (other,) = {*NODES} - {node}
    await told(made, model, lambda rungs: all(rungs.get(each) in ON_A_NODE for each in NODES))
    await made.take_off(other, model)
    await told(made, model, lambda rungs: rungs.keys() == {node})


async def until_node(made: Release, name: str, *, ready: bool) -> None:
    await made.api.until("Node", "", name, lambda one: condition(one, "Ready") is ready, WITHIN)


@pytest.mark.parametrize("model", CAPTURED_ON)
async def test_a_pod_goes_where_its_snapshot_is(installed: Release, client: aiohttp.ClientSession, model: str) -> None:
    assert await installed.holders(model) == [CAPTURED_ON[model]]
    assert len((await installed.ask(client, model))["digest"]) == 64
    pod = await pod_of(installed, model)
    assert (pod["spec"]["nodeName"], await beginning(installed, pod)) == (CAPTURED_ON[model], "Restored")
    await installed.at_zero(model)


async def test_each_gateway_reaches_the_pods_of_both_nodes(installed: Release, client: aiohttp.ClientSession) -> None:
    gateways = await installed.pods("zerowake-scaler")
    assert {pod["spec"]["nodeName"] for pod in gateways} == set(NODES)
    for model in CAPTURED_ON:
        for gateway in gateways:
            async with client.get(f"http://{gateway['status']['podIP']}:8080/models/{model}/sum") as answer:
                assert answer.status == 200, await answer.text()
                assert len((await answer.json(content_type=None))["digest"]) == 64
    for model in CAPTURED_ON:
        await installed.at_zero(model)


@contextlib.asynccontextmanager
async def kept(made: Release, client: aiohttp.ClientSession, model: str) -> AsyncIterator[str]:
    """A pod of the model stays though nobody asks; its answer."""
    await made.scaled(model, minReplicaCount=1)
    try:
        yield (await made.ask(client, model))["digest"]
    finally:
        await made.scaled(model)
        await made.at_zero(model)


async def back(made: Release, client: aiohttp.ClientSession, model: str) -> str:
    """Its pod is ended; the node and the beginning of the next one, which answers."""
    pod = await pod_of(made, model)
    await made.api.delete("Pod", made.namespace, pod["metadata"]["name"])
    await made.api.until("Pod", made.namespace, pod["metadata"]["name"], lambda one: one is None, WITHIN)
    await made.ask(client, model)
    pod = await pod_of(made, model)
    return f"{await beginning(made, pod)} on {pod['spec']['nodeName']}"


async def test_a_node_is_drained_and_comes_back(installed: Release, client: aiohttp.ClientSession) -> None:
    """Of all that can leave: the engine and a gateway. Requests are answered all the while."""
    async with kept(installed, client, "two") as before:
        assert (await pod_of(installed, "two"))["spec"]["nodeName"] == SECOND_NODE
        drain = ("kubectl", "drain", SECOND_NODE, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=100s")
        try:
            drained = asyncio.create_task(installed.run(*drain))
            while not drained.done():
                assert (await installed.ask(client, "two"))["digest"] == before
            await drained
            assert (await pod_of(installed, "two"))["spec"]["nodeName"] == NODE
            fetched = await told(installed, "two", lambda rungs: rungs.get(NODE) == "memory")
            assert fetched[SECOND_NODE] == "memory", "its agent is still there"
        finally:
            await installed.run("kubectl", "uncordon", SECOND_NODE)
        await alone(installed, "two")
        assert await back(installed, client, "two") == f"Restored on {SECOND_NODE}"


async def dies(_: Release) -> None:
    """What Kubernetes has on the node ends, and neither the engine nor the agent."""
    for program in ("kubelet", "containerd"):
        await asyncio.to_thread(tell, "kill", program, SECOND_NODE)


async def lives(made: Release) -> None:
    """The kubelet begins when the agent is the container runtime's plugin again: what is started sooner is started without it."""
    await asyncio.to_thread(tell, "start", "containerd", SECOND_NODE)
    logs = [*enter(SECOND_NODE), "sh", "-c", f"cat /var/log/pods/{made.namespace}_zerowake-agent-*/agent/*.log"]
    async with asyncio.timeout(WITHIN):
        while b"connected to the container runtime again" not in await asyncio.to_thread(subprocess.check_output, logs):
            await asyncio.sleep(0.1)  # a log tells nobody that it grew
    await asyncio.to_thread(tell, "start", "kubelet", SECOND_NODE)


async def loses_power(_: Release) -> None:
    await asyncio.to_thread(crash, SECOND_NODE)


async def boots(_: Release) -> None:
    await asyncio.to_thread(boot, SECOND_NODE)


async def test_when_its_node_takes_no_pods_another_fetches_the_snapshot_before_anybody_asks(
    installed: Release, client: aiohttp.ClientSession
) -> None:
    """By itself, from the cordoned node, which keeps it; the first request then is answered by a restored process."""
    before = (await installed.ask(client, "two"))["digest"]
    await installed.at_zero("two")
    async with cordoned(installed, SECOND_NODE):
        fetched = await told(installed, "two", lambda rungs: rungs.get(NODE) == "memory")
        assert fetched[SECOND_NODE] == "memory"
        assert (await installed.ask(client, "two"))["digest"] == before
        pod = await pod_of(installed, "two")
        assert (pod["spec"]["nodeName"], await beginning(installed, pod)) == (NODE, "Restored")
        await installed.at_zero("two")
    await alone(installed, "two")


def lacks(one: Object | None) -> str:
    """Why not as many nodes have the snapshot as its owner wants."""
    told = ((one or {}).get("status") or {}).get("conditions", [])
    return "".join(each["message"] for each in told if (each["type"], each["status"]) == ("Copied", "False"))


async def test_a_node_whose_taint_its_pods_do_not_tolerate_gets_no_copy(installed: Release) -> None:
    """What it has goes to the other node; a second copy, which is asked for meanwhile, comes only when the taint is gone."""
    of = snapshot("two")
    of["spec"] |= {"nodeSelector": {"kubernetes.io/hostname": SECOND_NODE}, "copies": 2}
    await installed.run("kubectl", "taint", "node", NODE, "team=other:NoSchedule")
    try:
        await told(installed, "one", lambda rungs: rungs.get(SECOND_NODE) in ON_A_NODE)
        await installed.api.apply(of, namespace=installed.namespace)
        why = f"node {NODE}: its pods do not tolerate the taint team=other:NoSchedule"
        await installed.api.until("ModelSnapshot", installed.namespace, "two", lambda one: why in lacks(one), WITHIN)
        assert await installed.holders("two") == [SECOND_NODE]
    finally:
        await installed.run("kubectl", "taint", "node", NODE, "team-")
    await installed.api.until("ModelSnapshot", installed.namespace, "two", lambda one: condition(one, "Copied"), WITHIN)
    of["spec"]["copies"] = 1
    await installed.api.apply(of, namespace=installed.namespace)
    for model in CAPTURED_ON:
        await alone(installed, model)


Change = Callable[[Release], Awaitable[None]]


@pytest.mark.parametrize(("goes", "comes"), [(dies, lives), (loses_power, boots)])
async def test_a_node_is_gone_and_comes_back(installed: Release, client: aiohttp.ClientSession, goes: Change, comes: Change) -> None:
    async with kept(installed, client, "two") as before:
        assert (await pod_of(installed, "two"))["spec"]["nodeName"] == SECOND_NODE
        await goes(installed)
        try:
            assert (await installed.ask(client, "two"))["digest"] == before, "by whoever there is"
            await until_node(installed, SECOND_NODE, ready=False)
            await ready_pod(installed, "two", NODE)
            assert (await installed.ask(client, "two"))["digest"] == before
            await installed.ask(client, "one")
            other = await pod_of(installed, "one")
            assert (other["spec"]["nodeName"], await beginning(installed, other)) == (NODE, "Restored")
            if goes is loses_power:
                assert await told(installed, "two", lambda rungs: rungs.get(SECOND_NODE) == "unknown") == {SECOND_NODE: "unknown"}
            else:
                fetched = await told(installed, "two", lambda rungs: rungs.get(NODE) in ON_A_NODE)
                assert fetched[SECOND_NODE] == "memory", "its agent speaks for it, and gives it to a node that takes pods"
        finally:
            await comes(installed)
            await until_node(installed, SECOND_NODE, ready=True)
        if goes is dies:
            await alone(installed, "two")
        assert await told(installed, "two", lambda rungs: rungs.get(SECOND_NODE) in ON_A_NODE)
        assert await back(installed, client, "two") == f"Restored on {SECOND_NODE}"
    await installed.at_zero("one")


async def test_a_snapshot_is_restored_on_a_node_that_never_ran_it(
    installed: Release, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """By a folder that agents of both nodes see, as they would see a volume."""
    before = (await installed.ask(client, "two"))["digest"]
    assert (await pod_of(installed, "two"))["spec"]["nodeName"] == SECOND_NODE
    await installed.at_zero("two")
    volume = {"name": "store", "hostPath": {"path": str(tmp_path)}}
    container = {"name": "agent", "volumeMounts": [{"name": "store", "mountPath": "/store"}]}
    patch = json.dumps({"spec": {"template": {"spec": {"containers": [container], "volumes": [volume]}}}})
    await installed.run("kubectl", "-n", installed.namespace, "patch", "daemonset/zerowake-agent", f"--patch={patch}")
    await installed.run("kubectl", "-n", installed.namespace, "rollout", "status", "daemonset/zerowake-agent", "--timeout=90s")
    for node, words in ((SECOND_NODE, ("push", "two", "--to=file:///store")), (NODE, ("pull", "two", "--from=file:///store"))):
        print(await installed.on_agent(node, *words, f"--namespace={installed.namespace}"))
    await told(installed, "two", lambda rungs: rungs.keys() == set(NODES))
    async with cordoned(installed, SECOND_NODE):
        begin = time.monotonic()
        assert (await installed.ask(client, "two"))["digest"] == before
        print(f"answered {time.monotonic() - begin:.2f} s after the request")
        pod = await pod_of(installed, "two")
        assert (pod["spec"]["nodeName"], await beginning(installed, pod)) == (NODE, "Restored")
        async with client.get(f"http://{pod['status']['podIP']}:8000/count") as answer:
            assert (await answer.json())["count"] > 1, "its process has answered before it was dumped, on the other node"
        await installed.at_zero("two")
