"""Pods whose snapshot is still on its way to their node when they come: real containers, CRIU and a folder that is its store."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from restore_agent.programs.on_kubernetes import pods_served
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.manifest import Manifest
from restore_agent.transfer.progress import Progress
from tests.worlds.image import PYTHON, SERVER
from tests.worlds.kubelet import COMMAND, NAMESPACE, Kubelet
from tests.worlds.waiting import until
from zerowake_shared import pod_contract

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")
# It takes seconds of work to be ready: by far longer than the fetch from a folder.
SLOW = f"import hashlib, runpy; hashlib.pbkdf2_hmac('sha256', b'', b'', 6_000_000); runpy.run_path('{SERVER}', run_name='__main__')"
COMMAND_OF_SLOW = (str(PYTHON), "-u", "-c", SLOW, *COMMAND[2:])
TOLD = {
    f"zerowake.dev/{key}": value for key, value in {"container": "engine", "port": "8000", "health": "/health", "model": "small"}.items()
}
CAPTURE = {**TOLD, "zerowake.dev/canary": '{"path": "/sum"}'}


def unheard(progress: Progress) -> None:
    """Nobody looks at it."""


class OnItsWay:
    """The fetch of a snapshot that stands still until it is let on, after its manifest has come."""

    def __init__(self, node: Node, url: str, snapshot: Snapshot) -> None:
        self._on, self._why = threading.Event(), ""
        pull = node.travel.pull(NAMESPACE, "small", snapshot.digest, [url], unheard, replace=True, fits=self._fits)
        self._pull = asyncio.create_task(pull)

    def let_on(self, why_not: str = "") -> None:
        """`why_not`: it ends instead."""
        self._why = why_not
        self._on.set()

    async def ended(self) -> Snapshot:
        """Raises Incompatible: it was to end."""
        return await self._pull

    def _fits(self, manifest: Manifest) -> None:
        self._on.wait(60)
        if self._why:
            raise Incompatible(self._why)


async def elsewhere(node: Node, kubelet: Kubelet, url: str) -> Snapshot:
    """A snapshot that this node has taken and put into a store, and does not have any more."""
    async with kubelet.pod("capture", {pod_contract.CAPTURE: "small"}, CAPTURE, command=COMMAND_OF_SLOW) as pod:
        assert await pod.exit_code() == 0, pod.log()
    snapshot = node.store.get(NAMESPACE, "small")
    await node.travel.push(snapshot, url, unheard)
    await node.remove(snapshot)
    return snapshot


async def test_a_pod_waits_for_its_snapshot_or_starts_cold(node: Node, kubelet: Kubelet, tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    url = f"file://{tmp_path}/bucket"
    labels = {pod_contract.SNAPSHOT: "small"}
    async with pods_served(node, kubelet.placeholder, kubelet.placeholder.with_name("cri.sock"), kubelet.folder):
        snapshot = await elsewhere(node, kubelet, url)
        node.restorer.overhead.clear()  # as on a node that never restored it
        told = {**TOLD, pod_contract.DIGEST: snapshot.digest}
        fetch = OnItsWay(node, url, snapshot)
        async with kubelet.pod("waits", labels, told, command=COMMAND_OF_SLOW):
            await kubelet.event("waits", "Fetching")
            fetch.let_on()
            await until(lambda: len(node.replicas))
            (replica,) = node.replicas
            phases = dict(replica.phases)
            assert (replica.origin, phases["fetch"] > 0) == (Origin.RESTORED, True)
            rest = sum(phases.values()) - phases["fetch"]
            assert node.restorer.overhead[snapshot.digest] <= rest, "what it waited is none of a restore's"
        assert await fetch.ended() == snapshot
        await until(lambda: not len(node.replicas))

        await node.remove(node.store.get(NAMESPACE, "small"))
        fetch = OnItsWay(node, url, snapshot)
        async with kubelet.pod("cold", labels, told, command=COMMAND_OF_SLOW):
            await kubelet.event("cold", "Fetching")
            fetch.let_on(why_not="another kernel")
            assert "was on its way to this node: another kernel" in await kubelet.event("cold", "RestoreFailed")
            await until(lambda: len(node.replicas))
            (replica,) = node.replicas
            assert replica.origin is Origin.COLD
        with pytest.raises(Incompatible):
            await fetch.ended()

        async with kubelet.pod("at-once", labels, told, command=COMMAND_OF_SLOW):
            assert "no snapshot" in await kubelet.event("at-once", "RestoreFailed")
        assert not [each for each in kubelet.events() if each[:2] == ("at-once", "Fetching")], "nothing is on its way"
