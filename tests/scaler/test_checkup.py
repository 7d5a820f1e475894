"""What `zerowake doctor --kubernetes` finds: a cluster on which all is well, and the same with its parts broken one by one."""

from __future__ import annotations

import base64
import datetime
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaler.kubernetes import checkup
from tests.worlds.certificates import Authority
from tests.worlds.command import zerowake
from tests.worlds.kubernetes_api import Api
from tests.worlds.ports import free_port
from zerowake_shared.checkup import Finding, Outcome, Subject, examine
from zerowake_shared.clock import SYSTEM_CLOCK
from zerowake_shared.kubernetes.resource import timestamp

OK, WARNING, FAILS = Outcome.OK, Outcome.WARNING, Outcome.FAILS
SUBJECT = Subject(Path("/nowhere"), Path("/nowhere"))
READY = {"conditions": [{"type": "Ready", "status": "True"}]}
REFUSED = {"conditions": [{"type": "Ready", "status": "False", "message": "dial tcp: refused"}]}
METRICS = "/api/v1/namespaces/zerowake/pods/scaler-0:9090/proxy/metrics"


@dataclass
class World:
    """A cluster as the chart and KEDA leave it, of two nodes."""

    api: Api

    async def made(self) -> World:
        for name, label in (("modelsnapshots.zerowake.dev", "0.1.0"), ("scaledobjects.keda.sh", "2.21.0")):
            await self.put("customresourcedefinitions", name, spec={"versions": [{"name": "v1alpha1", "served": True}]})
            established = {"conditions": [{"type": "Established", "status": "True"}]}
            labels = {"app.kubernetes.io/version": label}
            await self.change("customresourcedefinitions", name, metadata={"labels": labels}, status=established)
        await self.put("daemonsets", "zerowake-agent", "zerowake", spec={"template": {"spec": {"nodeSelector": {"gpu": "yes"}}}})
        for name in ("one", "two"):
            info = {"containerRuntimeVersion": "containerd://2.4.0", "kernelVersion": "6.12.0"}
            await self.put("nodes", name, status={**READY, "nodeInfo": info})
            await self.change("nodes", name, metadata={"labels": {"gpu": "yes"}})
            await self.put("leases", name, "kube-node-lease", spec={"renewTime": timestamp(SYSTEM_CLOCK.wall(), "microseconds")})
            await self.pod(f"agent-{name}", "zerowake", "app.kubernetes.io/name", "zerowake-agent", nodeName=name)
        await self.put("nodes", "plain", status={**READY, "nodeInfo": {"containerRuntimeVersion": "containerd://2.2.1"}})
        await self.pod("keda-operator-0", "keda", "app", "keda-operator")
        await self.pod("scaler-0", "zerowake", "app.kubernetes.io/name", "zerowake-scaler")
        self.api.texts[METRICS] = 'zerowake_keda_streams_open{rpc="StreamIsActive"} 2.0\n'
        await self.put("modelsnapshots", "chat", "models", spec={"model": "chat", "names": ["chat-de"]})
        await self.scaled("chat", model="chat")
        await self.certificate(Authority("zerowake", datetime.timedelta(days=900)))
        return self

    async def put(self, plural: str, name: str, namespace: str = "", **parts: Any) -> None:
        await self.api.put(plural, {"metadata": {"name": name, **({"namespace": namespace} if namespace else {})}, **parts})

    async def change(self, plural: str, name: str, namespace: str = "", **parts: Any) -> None:
        await self.api.change(plural, namespace, name, parts)

    async def pod(self, name: str, namespace: str, label: str, value: str, **spec: Any) -> None:
        await self.put("pods", name, namespace, spec=spec, status=READY)
        await self.change("pods", name, namespace, metadata={"labels": {label: value}})

    async def scaled(self, name: str, status: Any = None, **metadata: str) -> None:
        triggers = [{"type": "external-push", "metadata": {"scalerAddress": "zerowake-scaler:9443", **metadata}}, {"type": "cpu"}]
        await self.put("scaledobjects", name, "models", spec={"triggers": triggers}, status=status or READY)

    async def certificate(self, authority: Authority, told: Authority | None = None) -> None:
        own = authority.issue("zerowake-scaler").certificate
        bundle = base64.b64encode((told or authority).certificate).decode()
        await self.put("mutatingwebhookconfigurations", "zerowake", webhooks=[{"clientConfig": {"caBundle": bundle}}])
        await self.put("secrets", "zerowake-scaler-tls", "zerowake", data={"tls.crt": base64.b64encode(own).decode()})

    async def found(self, check: str) -> list[Finding]:
        (wanted,) = [each for each in checkup.CHECKS if each.name == check]
        return [line.finding for line in await examine([wanted], SUBJECT)]

    async def wrong(self, check: str) -> tuple[Outcome, str, str]:
        """The one finding that is not well: its outcome, of what, and what was found."""
        (finding,) = [each for each in await self.found(check) if each.outcome is not OK]
        assert finding.remedy
        return finding.outcome, finding.of, finding.found


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    api = Api()
    async with api.serve(tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield await World(api).made()


async def test_a_cluster_on_which_all_is_well(world: World) -> None:
    lines = await examine(checkup.CHECKS, SUBJECT)
    assert [line for line in lines if line.finding.outcome is not OK] == []
    assert {line.check for line in lines} == {check.name for check in checkup.CHECKS}
    said = {line.finding.found for line in lines}
    assert "2 of 2 nodes have one that is ready; without the labels of agent.nodeSelector: plain" in said
    assert {"Kubernetes v1.36.1 answers", "2 streams for 1 ScaledObjects", "1 in order"} <= said
    shown = await zerowake("doctor", "--kubernetes")
    assert "2 nodes keep the API server's time" in shown
    assert shown.splitlines()[-1].endswith(" 0 warnings, 0 fail")


async def test_an_api_that_is_not_there_is_told_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    (line,) = await examine(checkup.CHECKS, SUBJECT)
    assert (line.check, line.finding.outcome, line.finding.remedy) == ("API", FAILS, "run in a pod, or set KUBECONFIG")
    config = (tmp_path / "kubeconfig").read_text()
    port = config.partition("127.0.0.1:")[2].partition('"')[0]
    (tmp_path / "elsewhere").write_text(config.replace(port, str(free_port())))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "elsewhere"))
    (line,) = await examine(checkup.CHECKS, SUBJECT)
    assert "no answer from Kubernetes' API" in line.finding.found


async def test_who_may_not_look_is_told_so(world: World) -> None:
    world.api.refuse.append(("GET", "/pods", 403, "pods is forbidden"))
    outcome, _, said = await world.wrong("agents")
    assert (outcome, "pods is forbidden" in said) == (WARNING, True)


async def test_definitions_that_are_missing_or_of_another_version(world: World) -> None:
    await world.api.remove("customresourcedefinitions", "", "modelsnapshots.zerowake.dev")
    assert await world.wrong("definition") == (FAILS, "modelsnapshots.zerowake.dev", "there is none")
    await world.put("customresourcedefinitions", "modelsnapshots.zerowake.dev", spec={"versions": [{"name": "v1", "served": True}]})
    assert await world.wrong("definition") == (FAILS, "modelsnapshots.zerowake.dev", "serves v1, and not v1alpha1")
    await world.api.remove("customresourcedefinitions", "", "modelsnapshots.zerowake.dev")
    await world.change("customresourcedefinitions", "scaledobjects.keda.sh", metadata={"labels": {"app.kubernetes.io/version": "2.9.1"}})
    _, of_keda = await world.found("definition")
    assert (of_keda.outcome, of_keda.found) == (WARNING, "of version 2.9.1; 2.21 was tried with this zerowake")


async def test_keda_that_is_not_connected(world: World) -> None:
    world.api.texts[METRICS] = 'zerowake_keda_streams_open{rpc="StreamIsActive"} 0.0\n'
    assert await world.wrong("KEDA") == (FAILS, "connected", "KEDA holds no stream, with 1 ScaledObjects: nobody would wake their models")
    del world.api.texts[METRICS]
    assert (await world.wrong("KEDA"))[:2] == (WARNING, "connected")
    await world.change("pods", "scaler-0", "zerowake", status={"conditions": []})
    assert (await world.wrong("KEDA"))[:2] == (FAILS, "scaler")
    await world.change("pods", "scaler-0", "zerowake", status=READY)
    world.api.texts[METRICS] = 'zerowake_keda_streams_open{rpc="StreamIsActive"} 1.0\n'
    await world.change("pods", "keda-operator-0", "keda", status={"conditions": []})
    assert await world.wrong("KEDA") == (FAILS, "", "operator keda-operator-0 is not ready")


@pytest.mark.parametrize(
    ("metadata", "status", "outcome", "says"),
    [
        ({"model": "chta"}, None, WARNING, "is of the model 'chta'"),
        ({"model": "chat-de"}, None, OK, "2 in order"),
        ({"model": "chat", "targetPendin": "3"}, None, FAILS, "did you mean targetPending?"),
        ({"model": "chat"}, REFUSED, FAILS, "dial tcp: refused"),
    ],
)
async def test_scaled_objects(metadata: dict[str, str], status: Any, outcome: Outcome, says: str, world: World) -> None:
    await world.scaled("second", status, **metadata)
    found = await world.found("ScaledObjects")
    last = found[-1]
    assert (last.outcome, says in last.found) == (outcome, True), found


async def test_nodes_without_an_agent_say_why(world: World) -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "not found"}
    state = {"conditions": [], "containerStatuses": [{"state": {"waiting": waiting}}]}
    await world.change("pods", "agent-two", "zerowake", status=state)
    assert await world.wrong("agents") == (FAILS, "two", "agent-two is not ready: ImagePullBackOff not found")
    await world.api.remove("pods", "zerowake", "agent-two")
    assert await world.wrong("agents") == (FAILS, "two", "no agent's pod on it")
    await world.pod(
        "agent-waits", "zerowake", "app.kubernetes.io/name", "zerowake-agent", affinity={"nodes": [{"key": "name", "values": ["two"]}]}
    )
    full = {"conditions": [{"type": "PodScheduled", "status": "False", "message": "Insufficient memory"}]}
    await world.change("pods", "agent-waits", "zerowake", status=full)
    assert await world.wrong("agents") == (FAILS, "two", "no agent's pod on it: Insufficient memory")
    await world.change("nodes", "two", status={"conditions": [{"type": "Ready", "status": "Unknown", "message": "kubelet is silent"}]})
    assert await world.wrong("agents") == (WARNING, "two", "the node is not ready: kubelet is silent")
    await world.api.remove("daemonsets", "zerowake", "zerowake-agent")
    assert await world.wrong("agents") == (FAILS, "", "no DaemonSet zerowake-agent in namespace zerowake")


@pytest.mark.parametrize(
    ("runtime", "outcome"), [("containerd://1.7.2", FAILS), ("docker://29.0", FAILS), ("", FAILS), ("cri-o://1.34.0", WARNING)]
)
async def test_container_runtimes(runtime: str, outcome: Outcome, world: World) -> None:
    await world.change("nodes", "plain", status={"nodeInfo": {"containerRuntimeVersion": runtime}})
    assert (await world.wrong("container runtime"))[:2] == (outcome, "plain")


async def test_the_webhook_s_certificate(world: World) -> None:
    await world.certificate(Authority("zerowake", datetime.timedelta(days=3)))
    assert (await world.wrong("webhook"))[0] is WARNING
    await world.certificate(Authority("zerowake", datetime.timedelta(seconds=-1)))
    outcome, _, said = await world.wrong("webhook")
    assert (outcome, "its certificate ended on" in said) == (FAILS, True)
    await world.certificate(Authority("zerowake"), told=Authority("zerowake"))
    outcome, _, said = await world.wrong("webhook")
    assert (outcome, "is not from the authority" in said) == (FAILS, True)
    await world.put("mutatingwebhookconfigurations", "zerowake", webhooks=[{"clientConfig": {}}])
    assert (await world.wrong("webhook"))[0] is FAILS
    await world.api.remove("secrets", "zerowake", "zerowake-scaler-tls")
    outcome, _, said = await world.wrong("webhook")
    assert (outcome, "it is not installed" in said) == (FAILS, True)


def test_rights_are_those_of_the_chart_and_of_one_object_where_it_gives_them_to_one() -> None:
    found = Path("deploy/helm/zerowake/templates/rbac.yaml").read_text().split("\n---\n")
    roles = {
        kind: [part for part in found if f"kind: {kind}\n" in part and "name: zerowake-scaler\n" in part]
        for kind in ("ClusterRole", "Role")
    }
    for verb, group, plural, sub, name, own in checkup._RIGHTS:
        (role,) = roles["Role" if own else "ClusterRole"]
        rules = [yaml.safe_load(line)[0] for line in role.splitlines() if line.startswith("  - {apiGroups")]
        wanted = f"{plural}/{sub}" if sub else plural
        given = [rule for rule in rules if verb in rule["verbs"] and group in rule["apiGroups"] and wanted in rule["resources"]]
        assert [rule for rule in given if rule.get("resourceNames", [name]) == [name]], (verb, wanted, given)


@pytest.mark.parametrize("in_pod", [False, True])
async def test_rights_that_are_missing(in_pod: bool, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_pod:
        monkeypatch.setenv("POD_NAME", "scaler-0")
    world.api.forbidden |= {("list", "nodes"), ("patch", "deployments")}
    assert await world.wrong("rights") == (FAILS, "", "the scaler may not list nodes, patch deployments/scale.apps")
    asked = {path.rpartition("/")[2] for method, path in world.api.requests if method == "POST"}
    assert asked == {"selfsubjectaccessreviews" if in_pod else "subjectaccessreviews"}


async def test_clocks_that_differ(world: World) -> None:
    ahead = timestamp(SYSTEM_CLOCK.wall() + 600, "microseconds")
    await world.change("leases", "two", "kube-node-lease", spec={"renewTime": ahead})
    outcome, of, said = await world.wrong("clocks")
    assert (outcome, of) == (WARNING, "two")
    assert said.endswith(" s ahead of the API server's")
    world.api.date = "Sun, 01 Nov 2026 00:00:00 GMT"
    outcome, _, said = await world.wrong("API")
    assert (outcome, "behind this machine's" in said) == (WARNING, True)


def test_a_machine_is_looked_at_without_the_client_of_kubernetes() -> None:
    program = "import sys; import scaler.programs.checks; sys.exit('kubernetes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
