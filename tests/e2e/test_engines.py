"""Engines as people run them, captured and restored in pods of the installed chart, and asked through its gateway.

With threads, behind uvicorn, not root, with a root that cannot be written and no rights at all, with what Kubernetes says of the pod and of
a Secret in their environment. Whatever a machine does not allow is said by the ModelSnapshot, and the engine starts as it always did.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.api import Api, Object, condition
from tests.e2e.release import Release, is_ready, release

pytestmark = [pytest.mark.own_cluster("installs the chart, from images of this checkout"), pytest.mark.usefixtures("images")]
CAP_SYS_RESOURCE = 1 << 24
NO_RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED = {**NO_RIGHTS, "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "readOnlyRootFilesystem": True}
TEXTS = ["Good morning!", "A second, longer text."]


@pytest.fixture
async def installed(api: Api, namespace: str, kubeconfig: str) -> AsyncIterator[Release]:
    async with release(api, kubeconfig, namespace) as made:
        yield made


def engine(**container: Any) -> Object:
    """The tests' server, which hashes all of its memory and has a thread that waits."""
    return {
        "name": "engine",
        "image": "zerowake.test/engine:1",
        "imagePullPolicy": "Never",
        "args": ["8000", "16", "/mapped"],
        "ports": [{"name": "http", "containerPort": 8000}],
        **container,
    }


def behind_uvicorn(**container: Any) -> Object:
    return engine(image="zerowake.test/embeddings:1", args=["--port", "8000", "--timeout-keep-alive", "5"], **container)


def pod(container: Object, **spec: Any) -> Object:
    return {"spec": {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 1, "containers": [container], **spec}}


def with_temporary_files(container: Object, **spec: Any) -> Object:
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    return pod({**container, "volumeMounts": mounts}, volumes=[{"name": "tmp", "emptyDir": {}}], **spec)


ENGINES: dict[str, tuple[Object, str]] = {
    "threads": (pod(engine()), "/sum"),
    "uvicorn": (pod(behind_uvicorn()), "/v1/embeddings"),
    "readonly": (pod(engine(securityContext={**NO_RIGHTS, "readOnlyRootFilesystem": True})), "/sum"),
    "hardened": (with_temporary_files(behind_uvicorn(securityContext={**NO_RIGHTS, "readOnlyRootFilesystem": True})), "/v1/embeddings"),
    "user": (pod(engine(securityContext={"runAsUser": 1000, "runAsGroup": 1000})), "/sum"),
    "restricted": (with_temporary_files(engine(securityContext=RESTRICTED), securityContext={"fsGroup": 2000}), "/sum"),
}


def snapshot(name: str, template: Object, path: str, **spec: Any) -> Object:
    canary = {"path": path} if path == "/sum" else {"path": path, "body": {"model": name, "input": TEXTS}}
    health = "/health" if path == "/sum" else "/v1/models"
    body = {"port": 8000, "healthPath": health, "canary": canary, "template": template, **spec}
    return {"apiVersion": "zerowake.dev/v1alpha1", "kind": "ModelSnapshot", "metadata": {"name": name}, "spec": body}


def deployment(name: str, template: Object, replicas: int = 1) -> Object:
    labels = {"app": name, "zerowake.dev/snapshot": name}
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": {"metadata": {"labels": labels}, **template}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


async def events(api: Api, namespace: str, name: str) -> dict[str, str]:
    """By reason, of the pods of a Deployment."""
    every = await api.list("Event", namespace)
    return {one["reason"]: one["message"] for one in every if one["involvedObject"]["name"].startswith(f"{name}-")}


async def captured(release: Release, name: str, template: Object, path: str, **spec: Any) -> str:
    """Its digest."""
    await release.api.apply(snapshot(name, template, path, **spec), namespace=release.namespace)
    ready = await release.api.until("ModelSnapshot", release.namespace, name, lambda one: is_ready(one) or _failed(one), 180)
    assert is_ready(ready), f"{name}: {(ready or {}).get('status')}"
    digest: str = (ready or {})["status"]["digest"]
    return digest


def _failed(one: Object | None) -> bool:
    """As it is now, and not as an older version of it was."""
    status = (one or {}).get("status") or {}
    return status.get("phase") == "Failed" and status["observedGeneration"] == (one or {})["metadata"]["generation"]


async def asked(release: Release, name: str, path: str) -> Any:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as client,
        client.request(
            "GET" if path == "/sum" else "POST",
            f"{release.url}/models/{name}{path}",
            json=None if path == "/sum" else {"model": name, "input": TEXTS},
        ) as response,
    ):
        text = await response.text()
        assert response.status == 200, f"{name}: {response.status}: {text}"
        return json.loads(text)


async def restored(release: Release, name: str, template: Object, path: str) -> str:
    """A pod of its Deployment answers; its name."""
    await release.api.apply(deployment(name, template), namespace=release.namespace)
    answer = await asked(release, name, path)
    assert answer.get("digest") or len(answer["data"]) == 2, (name, answer)
    async with asyncio.timeout(10):  # the answer may come before the event
        while not (found := await events(release.api, release.namespace, name)).keys() & {"Restored", "ColdStarted"}:
            await asyncio.sleep(0.1)
    assert "Restored" in found and "ColdStarted" not in found, (name, found)
    pods = await release.api.list("Pod", release.namespace, f"app={name}")
    return str(pods[0]["metadata"]["name"])


def reads_limits_of_others() -> bool:
    """Whether the agent, which is root of this machine, may: CRIU needs it for engines that are not."""
    effective = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return bool(int(effective, 16) & CAP_SYS_RESOURCE)


async def test_engines_are_captured_and_restored(installed: Release) -> None:
    wanted = [name for name in ENGINES if reads_limits_of_others() or name not in ("user", "restricted")]
    for name in wanted:  # one after the other: what waits for two seconds of quiet would wait for the others' work
        await captured(installed, name, *ENGINES[name])
    for name in wanted:
        await restored(installed, name, *ENGINES[name])
        await installed.api.delete("Deployment", installed.namespace, name)


async def test_an_engine_that_cannot_be_captured_here_says_why_and_serves(installed: Release) -> None:
    if reads_limits_of_others():
        pytest.skip("this machine's root has CAP_SYS_RESOURCE, so that engines that are not root are captured")
    template, path = ENGINES["user"]
    await installed.api.apply(snapshot("user", template, path), deployment("user", template), namespace=installed.namespace)
    failed = await installed.api.until("ModelSnapshot", installed.namespace, "user", _failed, 120)
    assert failed
    said = next(each for each in failed["status"]["conditions"] if each["type"] == "Captured")
    assert "runs as user 1000" in said["message"] and "CAP_SYS_RESOURCE" in said["message"], said
    assert (await asked(installed, "user", path))["digest"]


async def test_what_an_engine_knows_of_its_pod(installed: Release) -> None:
    api, namespace = installed.api, installed.namespace
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    key = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "api"}}}
    template = pod(engine(env=[address, {"name": "URL", "value": "http://$(POD_IP):8000"}, key]))
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"api": "one"}}
    await api.apply(secret, snapshot("known", template, "/sum"), namespace=namespace)
    refused = await api.until("ModelSnapshot", namespace, "known", _failed, 60)
    assert refused
    assert "POD_IP (status.podIP), URL (status.podIP)" in str(refused["status"]["conditions"])

    first = await captured(installed, "known", template, "/sum", staleEnvironment="allowed")
    said = await api.get("ModelSnapshot", namespace, "known")
    assert condition(said, "StaleEnvironment")
    name = await restored(installed, "known", template, "/sum")
    assert "it keeps the capture pod's HOSTNAME, POD_IP, URL" in (await events(api, namespace, "known"))["Restored"]
    told = await installed.run("kubectl", "-n", namespace, "exec", name, "--", "cat", "/run/zerowake/control/environment.json")
    ip = (await api.get("Pod", namespace, name))["status"]["podIP"]
    assert (json.loads(told)["URL"], json.loads(told)["KEY"]) == (f"http://{ip}:8000", "one")

    await api.delete("Deployment", namespace, "known")
    await api.apply({**secret, "stringData": {"api": "two"}}, namespace=namespace)
    again = await api.until(
        "ModelSnapshot", namespace, "known", lambda one: is_ready(one) and (one or {})["status"]["digest"] != first, 120
    )
    assert again
    await asyncio.gather(
        *(
            api.until("Pod", namespace, each["metadata"]["name"], lambda one: one is None)
            for each in await api.list("Pod", namespace, "app=known")
        )
    )
    name = await restored(installed, "known", template, "/sum")
    environ = await installed.run("kubectl", "-n", namespace, "exec", name, "--", "sh", "-c", "cat /proc/[0-9]*/environ | tr '\\0' '\\n'")
    assert "KEY=two" in environ and "KEY=one" not in environ
