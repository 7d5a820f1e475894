"""zerowake as the chart installs it, from the images of this checkout: a ModelSnapshot is captured in a real pod, KEDA scales its
Deployment from zero over mutual TLS for a request at the gateway, the pod is restored, and an uninstall takes everything away again.

The release's name and kinds are the cluster's, so there is one install at a time; agents of other tests must not run on the node.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from restore_agent.snapshots.keyring import Keyring
from tests.e2e.api import Api, Object
from tests.e2e.chart import ROOT, everything, run, secrets_of
from tests.e2e.release import MODEL, Release, deployment, is_ready, is_scaled, snapshot, to_install

pytestmark = [pytest.mark.own_cluster("installs the chart, from images of this checkout"), pytest.mark.usefixtures("images")]


@pytest.fixture
async def release(api: Api, namespace: str, kubeconfig: str) -> AsyncIterator[Release]:
    """Nothing of zerowake is in the cluster before and after."""
    async with to_install(api, kubeconfig, namespace) as made:
        yield made


INSTALLED = "import importlib.metadata as m; print(*(f'{each.name}=={each.version}' for each in m.distributions()))"


async def test_a_snapshot_from_its_capture_to_the_uninstall(api: Api, release: Release, kubeconfig: str, tmp_path: Path) -> None:
    namespace = release.namespace
    key = Keyring(tmp_path / "keys").make()
    content = {"signing.pem": (tmp_path / "keys" / "signing.pem").read_text()}
    await api.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "fleet"}, "stringData": content}, namespace=namespace)
    before = await everything(kubeconfig, namespace)
    await release.helm_upgrade("--set=keda.tls=mutual,agent.keysSecret=fleet")
    await api.apply(snapshot(), deployment(), namespace=namespace)
    ready = await api.until("ModelSnapshot", namespace, MODEL, is_ready, 120)
    assert ready
    assert [each["rung"] for each in ready["status"]["locations"]] in (["disk"], ["memory"]) and len(ready["status"]["digest"]) == 64
    print(await release.run("kubectl", "-n", namespace, "get", "modelsnapshots"))
    (agent,) = await release.agents(*await release.holders())
    inside = ("kubectl", "-n", namespace, "exec", agent["metadata"]["name"], "--container", "agent", "--")
    assert f"signed by key {key}" in await release.run(*inside, "zerowake", "snapshot", "verify", MODEL, "--namespace", namespace)
    for where in (inside, ("kubectl", "-n", namespace, "exec", "deploy/zerowake-scaler", "--")):
        listed = json.loads(await release.run(*where, "cat", "/opt/zerowake/sbom.cdx.json"))["components"]
        installed = await release.run(*where, "/opt/zerowake/bin/python", "-c", INSTALLED)
        assert {f"{each['name']}=={each['version']}" for each in listed} | {"zerowake==0.1.0"} == set(installed.split())

    (keda,) = yaml_of("scaledobject-tls.yaml", namespace, "ClusterTriggerAuthentication")
    (scaled,) = yaml_of("scaledobject-tls.yaml", namespace, "ScaledObject")
    scaled["spec"] |= {"pollingInterval": 1, "cooldownPeriod": 5, "maxReplicaCount": 1}
    text = yaml.safe_dump_all([keda, scaled])
    await asyncio.to_thread(run, kubeconfig, "kubectl", "-n", namespace, "apply", "-f", "-", given=text)
    try:
        await api.until("ScaledObject", namespace, MODEL, is_scaled)
        await release.find_gateway()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as client:
            assert len((await release.ask(client))["digest"]) == 64
        await the_events_tell_it_in_order(api, namespace)
        await doctor_and_bundle(release, kubeconfig, scaled, tmp_path, content["signing.pem"])
        await api.until("Deployment", namespace, MODEL, lambda one: one and not one["spec"].get("replicas"))
    finally:
        await asyncio.to_thread(run, kubeconfig, "kubectl", "-n", namespace, "delete", "--ignore-not-found", "-f", "-", given=text)
        await api.delete("Deployment", namespace, MODEL)
    # With the snapshot still there: its artifact leaves the node, and then the CRD can go.
    await release.helm_uninstall()
    assert not await left_over(kubeconfig, namespace, before)


async def the_events_tell_it_in_order(api: Api, namespace: str) -> None:
    """As the chart's README has it: from the capture to the pod that was restored. In the order in which the API server took them."""
    every = sorted(await api.list("Event", namespace), key=lambda each: int(each["metadata"]["resourceVersion"]))
    story = [(each["involvedObject"]["kind"], each["reason"]) for each in every]
    print("; ".join(f"{kind} {reason}" for kind, reason in story))
    told = [
        ("Pod", "Captured"),
        ("ModelSnapshot", "Captured"),
        ("ScaledObject", "KEDAScaleTargetActivated"),
        ("Pod", "Scheduled"),
        ("Pod", "Restored"),
    ]
    last = [len(story) - 1 - story[::-1].index(each) for each in told if each in story]
    assert len(last) == len(told) and last == sorted(last), story
    assert ("Pod", "Started") in story and ("Pod", "ColdStarted") not in story


async def doctor_and_bundle(release: Release, kubeconfig: str, scaled: Object, folder: Path, secret: str) -> None:
    """What a user sees who looks for what is wrong: first nothing, then a trigger whose model is misspelt."""
    namespace = release.namespace
    code, found = await doctor(kubeconfig, namespace)
    told = {each["check"]: each for each in found["checks"] if each["outcome"] == "ok"}
    assert not [each for each in found["checks"] if each["outcome"] == "fails"] and code == 0, found
    assert {"API", "definition", "rights", "KEDA", "ScaledObjects", "agents", "container runtime", "webhook", "clocks"} <= told.keys()
    assert told["ScaledObjects"]["found"] == "1 in order"
    inside = ("kubectl", "-n", namespace, "exec", "deployment/zerowake-scaler", "--", "zerowake", "doctor", "--output", "json")
    found = json.loads(await release.run(*inside))
    assert found["ok"] and {each["check"] for each in found["checks"]} == {"version"} | told.keys(), "as itself it may ask about less"
    (trigger,) = scaled["spec"]["triggers"]
    wrong = {"spec": {"triggers": [{**trigger, "metadata": {**trigger["metadata"], "model": "chad"}}]}}
    change = ("kubectl", "-n", namespace, "patch", "scaledobject", MODEL, "--type=merge", "-p")
    await release.run(*change, json.dumps(wrong))
    try:
        code, found = await doctor(kubeconfig, namespace)
        (line,) = [each for each in found["checks"] if each["of"] == f"{namespace}/{MODEL}"]
        assert (code, line["outcome"], line["remedy"]) == (0, "warning", "did you mean chat?"), line
    finally:
        await release.run(*change, json.dumps({"spec": {"triggers": [trigger]}}))
    file = folder / "report.tar.gz"
    code, out = await zerowake(kubeconfig, "bundle", "--kubernetes", "--namespace", namespace, "--to", str(file))
    assert code == 0, out
    with tarfile.open(file) as bundle:
        held = {one.name: (bundle.extractfile(one) or io.BytesIO()).read() for one in bundle.getmembers() if one.isfile()}
    names = {name.partition("/")[2] for name in held}  # below a folder of its own
    agents = [pod["metadata"]["name"] for pod in await release.pods("zerowake-agent")]
    assert {"kubernetes/modelsnapshots.json", "kubernetes/zerowake-scaler.json", "doctor.json"} <= names
    assert {f"kubernetes/logs/{agent}/agent.log" for agent in agents} <= names
    middle = secret.splitlines()[1].encode()
    assert not [name for name, data in held.items() if middle in data], "the fleet's key is in it"


async def doctor(kubeconfig: str, namespace: str) -> tuple[int | None, Any]:
    code, out = await zerowake(kubeconfig, "doctor", "--kubernetes", "--namespace", namespace, "--output", "json")
    return code, json.loads(out)


async def zerowake(kubeconfig: str, *words: str) -> tuple[int | None, str]:
    command = (sys.executable, "-m", "scaler.programs.cli", *words)
    environment = os.environ | {"KUBECONFIG": kubeconfig}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def test_an_upgrade_keeps_the_certificates(api: Api, release: Release, kubeconfig: str, tmp_path: Path) -> None:
    namespace = release.namespace
    nowhere = "--set=agent.nodeSelector.zerowake-tests=nowhere"  # the scaler's side is enough here
    before = await everything(kubeconfig, namespace)
    notes = await release.helm_upgrade(nowhere, "--set=keda.tls=server")
    assert f"zerowake-scaler.{namespace}.svc.cluster.local:9443" in notes
    policy = await api.ask("GET", "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/zerowake-agent")
    assert not (policy["status"].get("typeChecking") or {}).get("expressionWarnings")
    first = secrets_of(await api.list("Secret", namespace))
    assert first.keys() == {"zerowake-scaler-tls", "zerowake-agent-tls", "zerowake-keda-server-tls"}
    await asyncio.to_thread(agents_keep_to_their_node, kubeconfig, namespace, tmp_path)
    await release.helm_upgrade(nowhere, "--set=keda.tls=server,scaler.drainSeconds=5")
    assert secrets_of(await api.list("Secret", namespace)) == first
    await release.helm_uninstall()
    assert not await left_over(kubeconfig, namespace, before)


def yaml_of(example: str, namespace: str, kind: str) -> list[Object]:
    """The example's objects of that kind, with the scaler in this release's namespace."""
    text = (ROOT / "deploy/examples" / example).read_text().replace("zerowake-scaler.zerowake.svc", f"zerowake-scaler.{namespace}.svc")
    return [one for one in yaml.safe_load_all(text) if one["kind"] == kind]


async def left_over(kubeconfig: str, namespace: str, before: set[str]) -> set[str]:
    """What is there that was not, once pods have ended."""
    left: set[str] = set()
    for _ in range(60):
        left = await everything(kubeconfig, namespace) - before
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
