"""zerowake as the chart installs it, from the images of this checkout: a ModelSnapshot is captured in a real pod, KEDA scales its
Deployment from zero over mutual TLS for a request at the gateway, the pod is restored, and an uninstall takes everything away again.

The release's name and kinds are the cluster's, so there is one install at a time; agents of other tests must not run on the node.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml

from tests.e2e.api import Api, Object
from tests.e2e.chart import CHART, CRD, ROOT, everything, run, secrets_of

pytestmark = [pytest.mark.own_cluster("installs the chart, from images of this checkout"), pytest.mark.usefixtures("images")]

IMAGES = "scaler.image.pullPolicy=Never,agent.image.pullPolicy=Never,scaler.resources.requests.cpu=50m"
ENGINE = {
    "name": "engine",
    "image": "zerowake.test/engine:1",
    "imagePullPolicy": "Never",
    "args": ["8000", "16", "/mapped"],
    "ports": [{"name": "http", "containerPort": 8000}],
}


@pytest.fixture
async def release(api: Api, namespace: str, kubeconfig: str) -> AsyncIterator[str]:
    """Nothing of zerowake is in the cluster before and after."""
    for one in await api.list("CustomResourceDefinition"):
        owner = one["metadata"].get("annotations", {}).get("meta.helm.sh/release-namespace")
        if one["metadata"]["name"] == CRD and owner:
            pytest.fail(f"zerowake is installed in namespace {owner} of this cluster; uninstall it first", pytrace=False)
        if one["metadata"]["name"] == CRD:
            await api.delete("CustomResourceDefinition", "", CRD)
            await api.until("CustomResourceDefinition", "", CRD, lambda found: found is None)
    yield namespace
    await asyncio.to_thread(run, kubeconfig, "helm", "uninstall", "zerowake", "-n", namespace, "--ignore-not-found", "--wait")


async def helm_upgrade(kubeconfig: str, namespace: str, *options: str) -> str:
    command = (
        "helm",
        "upgrade",
        "--install",
        "zerowake",
        str(CHART),
        "-n",
        namespace,
        f"--set={IMAGES}",
        *options,
        "--wait",
        "--timeout=3m",
    )
    return await asyncio.to_thread(run, kubeconfig, *command)


async def test_a_snapshot_from_its_capture_to_the_uninstall(api: Api, release: str, kubeconfig: str) -> None:
    before = await everything(kubeconfig, release)
    await helm_upgrade(kubeconfig, release, "--set=keda.tls=mutual")
    for one in model(release):
        await api.apply(one, namespace=release)
    ready = await api.until("ModelSnapshot", release, "chat", lambda one: one and (one.get("status") or {}).get("phase") == "Ready", 120)
    assert ready
    assert [each["rung"] for each in ready["status"]["nodes"]] in (["disk"], ["memory"]) and len(ready["status"]["digest"]) == 64
    shown = await asyncio.to_thread(run, kubeconfig, "kubectl", "-n", release, "get", "modelsnapshots")
    print(shown)

    (keda,) = yaml_of("scaledobject-tls.yaml", release, "ClusterTriggerAuthentication")
    (scaled,) = yaml_of("scaledobject-tls.yaml", release, "ScaledObject")
    scaled["spec"] |= {"pollingInterval": 1, "cooldownPeriod": 5, "maxReplicaCount": 1}
    text = yaml.safe_dump_all([keda, scaled])
    await asyncio.to_thread(run, kubeconfig, "kubectl", "-n", release, "apply", "-f", "-", given=text)
    try:
        await api.until("ScaledObject", release, "chat", lambda one: "Ready" in str((one or {}).get("status", {}).get("conditions")))
        service = await api.get("Service", release, "zerowake")
        url = f"http://{service['spec']['clusterIP']}/models/chat/sum"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as client, client.get(url) as response:
            answer = await response.text()
            assert response.status == 200, answer
        assert len(json.loads(answer)["digest"]) == 64
        reasons = {each["reason"] for each in await api.list("Event", release) if each["involvedObject"]["name"].startswith("chat-")}
        assert "Restored" in reasons and "ColdStarted" not in reasons
        await api.until("Deployment", release, "chat", lambda one: one and not one["spec"].get("replicas"))
    finally:
        await asyncio.to_thread(run, kubeconfig, "kubectl", "-n", release, "delete", "--ignore-not-found", "-f", "-", given=text)
        await api.delete("Deployment", release, "chat")
    # With the snapshot still there: its artifact leaves the node, and then the CRD can go.
    await asyncio.to_thread(run, kubeconfig, "helm", "uninstall", "zerowake", "-n", release, "--wait", "--timeout=4m")
    assert not await left_over(kubeconfig, release, before)


async def test_an_upgrade_keeps_the_certificates(api: Api, release: str, kubeconfig: str, tmp_path: Path) -> None:
    nowhere = "--set=agent.nodeSelector.zerowake-tests=nowhere"  # the scaler's side is enough here
    before = await everything(kubeconfig, release)
    notes = await helm_upgrade(kubeconfig, release, nowhere, "--set=keda.tls=server")
    assert f"zerowake-scaler.{release}.svc.cluster.local:9443" in notes
    policy = await api.ask("GET", "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/zerowake-agent")
    assert not (policy["status"].get("typeChecking") or {}).get("expressionWarnings")
    first = secrets_of(await api.list("Secret", release))
    assert first.keys() == {"zerowake-scaler-tls", "zerowake-agent-tls", "zerowake-keda-server-tls"}
    await asyncio.to_thread(agents_keep_to_their_node, kubeconfig, release, tmp_path)
    await helm_upgrade(kubeconfig, release, nowhere, "--set=keda.tls=server,scaler.drainSeconds=5")
    assert secrets_of(await api.list("Secret", release)) == first
    await asyncio.to_thread(run, kubeconfig, "helm", "uninstall", "zerowake", "-n", release, "--wait", "--timeout=4m")
    assert not await left_over(kubeconfig, release, before)


def model(namespace: str) -> list[Object]:
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "chat"},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": {"app": "chat"}},
            "template": {
                "metadata": {"labels": {"app": "chat", "zerowake.dev/snapshot": "chat"}},
                "spec": {
                    "containers": [{**ENGINE, "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1}}]
                },
            },
        },
    }
    snapshot = {
        "apiVersion": "zerowake.dev/v1alpha1",
        "kind": "ModelSnapshot",
        "metadata": {"name": "chat"},
        "spec": {"port": 8000, "canary": {"path": "/sum"}, "template": {"spec": {"containers": [ENGINE]}}},
    }
    return [deployment, snapshot]


def yaml_of(example: str, namespace: str, kind: str) -> list[Object]:
    """The example's objects of that kind, with the scaler in this release's namespace."""
    text = (ROOT / "deploy/examples" / example).read_text().replace("zerowake-scaler.zerowake.svc", f"zerowake-scaler.{namespace}.svc")
    return [one for one in yaml.safe_load_all(text) if one["kind"] == kind]


async def left_over(kubeconfig: str, release: str, before: set[str]) -> set[str]:
    """What is there that was not, once pods have ended."""
    left: set[str] = set()
    for _ in range(60):
        left = await everything(kubeconfig, release) - before
        if not left:
            break
        await asyncio.sleep(1)
    return left


def agents_keep_to_their_node(kubeconfig: str, namespace: str, folder: Path) -> None:
    """An agent whose token was stolen annotates pods of its own node, and that is all."""
    admin = ("kubectl", "-n", namespace)
    pod = run(kubeconfig, *admin, "get", "pods", "-l", "app.kubernetes.io/name=zerowake-scaler", "-o", "name").split()[0]
    node = run(kubeconfig, *admin, "get", pod, "-o", "jsonpath={.spec.nodeName}")
    config = yaml.safe_load(Path(kubeconfig).read_text())
    for name, change, expected in (
        (node, {"annotations": {"zerowake.dev/captured": "x"}}, ""),
        (node, {"labels": {"app": "x"}}, "an agent changes annotations only"),
        (node, {"finalizers": ["zerowake.dev/x"]}, "an agent changes annotations only"),
        ("another", {"annotations": {"zerowake.dev/captured": "x"}}, "an agent changes pods of its own node only"),
    ):
        agent = {
            "as": f"system:serviceaccount:{namespace}:zerowake-agent",
            "as-user-extra": {"authentication.kubernetes.io/node-name": [name]},
        }
        users = [{**user, "user": {**user["user"], **agent}} for user in config["users"]]
        (folder / "agent").write_text(yaml.safe_dump({**config, "users": users}))
        command = (*admin, "patch", pod, "--type=merge", "--dry-run=server", "-p", json.dumps({"metadata": change}))
        if expected:
            with pytest.raises(AssertionError, match=expected):
                run(str(folder / "agent"), *command)
        else:
            run(str(folder / "agent"), *command)
        with pytest.raises(AssertionError, match="forbidden"):
            run(str(folder / "agent"), *admin, "delete", pod, "--dry-run=server")
