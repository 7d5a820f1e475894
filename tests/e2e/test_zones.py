"""Copies of a snapshot on nodes of several zones, as a cloud labels them: the second one stands where no failure of the first zone reaches.

With the usual two nodes each is a zone of its own. With three (`make cluster NODES=3`) two share one, and the node that comes first by its
name would be the wrong one.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from restore_agent.snapshots.keyring import Keyring
from tests.e2e.api import Api, Object, condition
from tests.e2e.cluster.layout import NODE, members
from tests.e2e.release import Release, deployment, is_ready, own_namespace, snapshot, to_install
from tests.e2e.travelling import ON_A_NODE, WITHIN, places, said

pytestmark = [
    pytest.mark.own_cluster("labels nodes as zones"),
    pytest.mark.usefixtures("images", "reported"),
    pytest.mark.asyncio(loop_scope="module"),
]
ZONE = "topology.kubernetes.io/zone"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(kubeconfig: str, images: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Release]:
    keys = tmp_path_factory.mktemp("keys")
    Keyring(keys).make()
    async with Api.connect(kubeconfig) as api, own_namespace(api, "zones") as namespace, to_install(api, kubeconfig, namespace) as made:
        secret = ("create", "secret", "generic", "zerowake-keys", f"--from-file={keys}/signing.pem")
        await made.run("kubectl", "-n", namespace, *secret)
        await made.helm_upgrade("--set=agent.keysSecret=zerowake-keys")
        yield made


@contextlib.asynccontextmanager
async def zones(made: Release, of: dict[str, str]) -> AsyncIterator[None]:
    """Node → its zone."""
    for node, zone in of.items():
        await made.run("kubectl", "label", "node", node, f"{ZONE}={zone}")
    try:
        yield
    finally:
        for node in of:
            await made.run("kubectl", "label", "node", node, f"{ZONE}-")


def is_copied(one: Object | None) -> bool:
    return condition(one, "Copied")


async def test_the_second_copy_stands_in_another_zone(installed: Release) -> None:
    """Where no node of another zone takes the model's pods, one of the same zone gets it."""
    api, namespace = installed.api, installed.namespace
    *same, last = [each.name for each in members()]
    of = snapshot("chat")
    async with zones(installed, {**dict.fromkeys(same, "a"), last: "b"}):
        bound = of | {"spec": {**of["spec"], "nodeSelector": {"kubernetes.io/hostname": NODE}}}
        await api.apply(bound, deployment("chat", of="chat"), namespace=namespace)
        await api.until("ModelSnapshot", namespace, "chat", is_ready, WITHIN)
        assert await installed.holders("chat") == [NODE]
        bound["spec"]["copies"] = 2
        await api.apply(bound, namespace=namespace)
        found = await api.until("ModelSnapshot", namespace, "chat", is_copied, WITHIN)
        assert {node for node, rung in places(found).items() if rung in ON_A_NODE} == {NODE, last}

        # A zone whose nodes take none of its pods has no copy that counts: the next is made where there is a node, if there is one.
        await installed.run("kubectl", "cordon", last)
        try:
            found = await api.until("ModelSnapshot", namespace, "chat", lambda one: counts_without(one, last) or len(members()) > 2, WITHIN)
            if len(members()) > 2:
                found = await api.until("ModelSnapshot", namespace, "chat", lambda one: len(places(one)) == 3 and is_copied(one), WITHIN)
            assert set(same) <= places(found).keys()
        finally:
            await installed.run("kubectl", "uncordon", last)
        await api.until("ModelSnapshot", namespace, "chat", is_copied, WITHIN)


def counts_without(one: Object | None, node: str) -> bool:
    """The node's copy counts no more, and the condition says why."""
    status, reason, message = said(one, "Copied")
    return (status, reason) == ("False", "TooFew") and message.startswith("1 of 2 copies stand where they count") and node in message
