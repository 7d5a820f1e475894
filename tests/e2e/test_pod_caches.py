"""Pods of a real kubelet that have to start cold, and whose engines find what was compiled before the snapshot was taken.

The snapshot fits no more, since the pods' owner has changed what the engine is told; and in one of them the engine is another user.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.api import Api, Object, condition
from tests.e2e.node_agent import PORT, Agent, answer, captured_or_not, events, pod, run_in
from tests.worlds.module_compiling_engine import KERNELS

pytestmark = pytest.mark.own_cluster("runs an agent of its own on the node")
ENGINE = Path(__file__).parents[1] / "worlds/module_compiling_engine.py"
COMMAND = ["python3", "-c", ENGINE.read_text(), str(PORT)]
SOMEBODY, FOLDER = 4711, "/tmp/torchinductor_engineer"


def of(agent: Agent, name: str, label: str, size: str, user: int = 0) -> Object:
    env = {"SIZE": size, "LOGNAME": "engineer"}  # by which torch has the folder's name
    asked: dict[str, Any] = {"env": [{"name": key, "value": value} for key, value in env.items()], "securityContext": {"runAsUser": user}}
    return pod(agent, name, {f"zerowake.dev/{label}": "small"}, COMMAND, container=asked)


async def test_a_pod_that_starts_cold_compiles_nothing_anew(api: Api, namespace: str, running: Agent) -> None:
    await api.apply(of(running, "capture-small", "capture", "one"), namespace=namespace)
    annotations = await captured_or_not(api, namespace, "small")
    assert annotations.get("zerowake.dev/captured"), annotations
    found = {}
    for name, size, user, reason in (
        ("fits", "one", 0, "Restored"),
        ("other", "two", 0, "ColdStarted"),
        ("others", "two", SOMEBODY, "ColdStarted"),
    ):
        await api.apply(of(running, name, "snapshot", size, user), namespace=namespace)
        print(name, dict(await events(api, namespace, name, reason))[reason])
        ready = await api.until("Pod", namespace, name, lambda one: condition(one, "Ready"))
        assert ready
        owners = await run_in(namespace, name, f"find {FOLDER} -printf '%U\\n' | sort -u")
        found[name] = await answer(ready["status"]["podIP"], "/compiled"), owners.split()
    assert found == {"fits": (KERNELS, ["0"]), "other": (0, ["0"]), "others": (0, [str(SOMEBODY)])}, (
        "what was restored has compiled, before it was dumped; what starts cold has the files of its own user"
    )
