"""Compile caches in pods: taken with the snapshot, and laid out where a pod has to start cold. Real containers and CRIU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from restore_agent.programs.on_kubernetes import pods_served
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin, Replica
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.manifest import Manifest
from tests.worlds.agent import PORT
from tests.worlds.image import PYTHON
from tests.worlds.kubelet import NAMESPACE, Kubelet
from tests.worlds.module_compiling_engine import KERNELS
from tests.worlds.waiting import until
from zerowake_shared import pod_contract

pytestmark = pytest.mark.usefixtures("needs_criu", "needs_runc")
ENGINE = Path(__file__).parents[1] / "worlds/module_compiling_engine.py"
COMMAND = (str(PYTHON), "-u", "-c", ENGINE.read_text(), str(PORT))
TOLD = {
    f"zerowake.dev/{key}": value for key, value in {"container": "engine", "port": str(PORT), "health": "/health", "model": "small"}.items()
}
CAPTURE = {**TOLD, "zerowake.dev/canary": '{"path": "/sum"}'}


def sized(size: str) -> dict[str, Any]:
    """Asked for by its owner, so that an engine of another size is another engine."""
    return {"containers": [{"name": "engine", "ports": [{"containerPort": PORT}], "env": [{"name": "SIZE", "value": size}]}]}


def fits_nowhere(manifest: Manifest) -> None:
    raise Incompatible("it was taken with another driver")


async def asked(of: Replica, path: str) -> object:
    async with of.engine.session() as session:
        return json.loads((await of.engine.ask(session, path)).body)


@pytest.mark.parametrize("folder", ["", "TORCHINDUCTOR_CACHE_DIR=/var/cache/kernels"], ids=["usual", "named"])
async def test_a_pod_that_starts_cold_finds_what_was_compiled_before_the_snapshot(node: Node, kubelet: Kubelet, folder: str) -> None:
    env = ["LOGNAME=engineer", *([folder] if folder else [])]
    async with pods_served(node, kubelet.placeholder, kubelet.placeholder.with_name("cri.sock"), kubelet.folder):
        async with kubelet.pod(
            "capture", {pod_contract.CAPTURE: "small"}, CAPTURE, command=COMMAND, env=[*env, "SIZE=one"], **sized("one")
        ) as pod:
            assert await pod.exit_code() == 0, pod.log()
        manifest = node.store.get(NAMESPACE, "small").manifest
        assert "caches/index.json" in manifest.files

        async with kubelet.pod("other", {pod_contract.SNAPSHOT: "small"}, TOLD, command=COMMAND, env=[*env, "SIZE=two"], **sized("two")):
            assert "SIZE" in await kubelet.event("other", "RestoreFailed")
            await until(lambda: len(node.replicas))
            (replica,) = node.replicas
            assert (replica.origin, await asked(replica, "/compiled")) == (Origin.COLD, 0)
            assert "image.caches" in dict(replica.phases)
        await until(lambda: not len(node.replicas))

        async with kubelet.pod("fits", {pod_contract.SNAPSHOT: "small"}, TOLD, command=COMMAND, env=[*env, "SIZE=one"], **sized("one")):
            await until(lambda: len(node.replicas))
            (replica,) = node.replicas
            assert (replica.origin, await asked(replica, "/compiled")) == (Origin.RESTORED, KERNELS)


async def test_a_pod_finds_them_on_a_node_that_its_snapshot_does_not_fit(node: Node, kubelet: Kubelet, tmp_path: Path) -> None:
    """Nothing else of the snapshot is there."""
    (tmp_path / "remote").mkdir()
    url = f"file://{tmp_path}/remote"
    env = ["LOGNAME=engineer", "SIZE=one"]
    async with pods_served(node, kubelet.placeholder, kubelet.placeholder.with_name("cri.sock"), kubelet.folder):
        async with kubelet.pod("capture", {pod_contract.CAPTURE: "small"}, CAPTURE, command=COMMAND, env=env, **sized("one")) as pod:
            assert await pod.exit_code() == 0, pod.log()
        snapshot = node.store.get(NAMESPACE, "small")
        await node.travel.push(snapshot, url, lambda progress: None)
        await node.remove(snapshot)
        with pytest.raises(Incompatible):
            await node.travel.pull(NAMESPACE, "small", snapshot.digest, [url], lambda progress: None, replace=True, fits=fits_nowhere)
        assert not list(node.store.names())
        async with kubelet.pod("cold", {pod_contract.SNAPSHOT: "small"}, TOLD, command=COMMAND, env=env, **sized("one")):
            assert "no snapshot" in await kubelet.event("cold", "RestoreFailed")
            await until(lambda: len(node.replicas))
            (replica,) = node.replicas
            assert (replica.origin, await asked(replica, "/compiled")) == (Origin.COLD, 0)
            assert "image.caches" in dict(replica.phases)
