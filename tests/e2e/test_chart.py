"""The chart and the examples: linted, rendered in each of their ways, taken by the API server. Installed: test_installed.py."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from scaler.programs.serve_config import load
from tests.e2e.api import Api
from tests.e2e.chart import CHART, ROOT, definition, render, run, secrets_of

EXAMPLES = sorted((ROOT / "deploy/examples").glob("*.yaml"))
WAYS = {
    "default": (),
    "everything": (
        "--set=keda.tls=mutual,gpumem.enabled=true,gpumem.runtimeClassName=nvidia,agent.nodeSelector.gpu=yes,agent.keysSecret=fleet,gateway.service.type=NodePort",
        "--set=networkPolicies.metricsFrom.matchLabels.team=a,scaler.nodeSelector.zone=b,scaler.sources.hosts={prometheus.monitoring.svc},scaler.image.digest=sha256:"
        + "0" * 64,
    ),
    "private": ("--set=imagePullSecrets[0].name=registry,agent.priorityClassName=",),
    "little": ("--set=networkPolicies.enabled=false,scaler.replicas=1,keda.tls=server",),
}


def test_it_lints(kubeconfig: str) -> None:
    for options in WAYS.values():
        assert "0 chart(s) failed" in run(kubeconfig, "helm", "lint", "--strict", str(CHART), *options)


@pytest.mark.parametrize("way", WAYS)
async def test_every_manifest_is_taken(api: Api, namespace: str, kubeconfig: str, way: str) -> None:
    objects = render(kubeconfig, namespace, *WAYS[way])
    assert len(objects) > 25
    text = yaml.safe_dump_all(objects)
    said = run(
        kubeconfig, "kubectl", "apply", "--dry-run=server", "--validate=strict", "--server-side", "--force-conflicts", "-f", "-", given=text
    )
    assert len(said.splitlines()) == len(objects)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
async def test_every_example_is_taken(api: Api, namespace: str, kubeconfig: str, example: Path) -> None:
    async with definition(api, kubeconfig):
        run(kubeconfig, "kubectl", "-n", namespace, "apply", "--dry-run=server", "--validate=strict", "-f", str(example))


@pytest.mark.parametrize(
    "wrong",
    [
        "scaler.replicas=0",
        "scaler.objective=median",
        "scaler.memoryQuotas.team-a=much",
        "scaler.memoryQuotas.team-a=1.2.3Gi",
        "scaler.memoryQuotas.Team=1Gi",
        "keda.tls=yes",
        "gpumem.reserve=lots",
        "agent.stateDirectory=here",
        "agent.peerRate=fast",
        "agent.memory=much",
        "agent.disk=all",
        "agent.orphanGraceSeconds=0",
        "monitoring.interval=often",
        "nothing=1",
        "scaler.image.digest=latest",
        "scaler.sources.hosts[0]=http://prometheus.example",
    ],
)
def test_values_are_checked(kubeconfig: str, wrong: str) -> None:
    with pytest.raises(AssertionError, match="values don't meet the specifications"):
        render(kubeconfig, "zerowake", "--set", wrong)


def values(below: object, *path: str) -> Iterator[str]:
    """The names of all values, of those that hold others, too."""
    if path:
        yield ".".join(path)
    if isinstance(below, dict):
        for name, value in below.items():
            yield from values(value, *path, name)


@pytest.mark.parametrize("taken_away", values(yaml.safe_load((CHART / "values.yaml").read_text())))
def test_a_value_that_is_taken_away_is_none_or_is_missed(kubeconfig: str, tmp_path: Path, taken_away: str) -> None:
    """Helm removes what is set to null, and the chart's own default with it."""
    try:
        objects = render(kubeconfig, "zerowake", "--set", f"{taken_away}=null")
    except AssertionError as refused:
        assert "values don't meet the specifications" in str(refused) and taken_away.rpartition(".")[2] in str(refused)
        return
    (text,) = (one["data"]["zerowake.yaml"] for one in objects if one["kind"] == "ConfigMap" and "zerowake.yaml" in one["data"])
    (tmp_path / "zerowake.yaml").write_text(text)
    load(tmp_path / "zerowake.yaml")


def test_agent_and_gpumem_ask_for_the_driver(kubeconfig: str) -> None:
    """Both use it, and NVIDIA's container runtime gives it to a container that asks, however privileged it is."""
    objects = render(kubeconfig, "zerowake", *WAYS["everything"])
    (pod,) = [one["spec"]["template"]["spec"] for one in objects if one["kind"] == "DaemonSet"]
    assert pod["runtimeClassName"] == "nvidia"
    for container in pod["containers"]:
        env = {each["name"]: each.get("value") for each in container["env"]}
        assert (env["NVIDIA_VISIBLE_DEVICES"], env["NVIDIA_DRIVER_CAPABILITIES"]) == ("all", "compute,utility"), container["name"]


def test_the_agent_alone_has_the_keys_that_snapshots_are_signed_by(kubeconfig: str) -> None:
    objects = render(kubeconfig, "zerowake", *WAYS["everything"])
    (pod,) = [one["spec"]["template"]["spec"] for one in objects if one["kind"] == "DaemonSet"]
    assert [each["secret"]["secretName"] for each in pod["volumes"] if each["name"] == "keys"] == ["fleet"]
    mounted = {each["name"]: [one["mountPath"] for one in each["volumeMounts"] if one["name"] == "keys"] for each in pod["containers"]}
    assert mounted == {"agent": ["/etc/zerowake/keys"], "gpumem": []}
    agent = next(each for each in pod["containers"] if each["name"] == "agent")
    assert {"name": "ZEROWAKE_KEYS", "value": "/etc/zerowake/keys"} in agent["env"]
    assert "ZEROWAKE_KEYS" not in yaml.safe_dump_all(render(kubeconfig, "zerowake"))


def test_cert_manager_s_way(kubeconfig: str) -> None:
    """Its kinds are not in this cluster, so no API server is asked: each issuer and Secret that is named is made."""
    objects = render(kubeconfig, "zerowake", "--set=certificates.from=cert-manager,keda.tls=mutual")
    assert not [one for one in objects if one["kind"] == "Secret"]
    certificates = {one["spec"]["secretName"]: one["spec"] for one in objects if one["kind"] == "Certificate"}
    issuers = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "Issuer"}
    assert {"zerowake-scaler-tls", "zerowake-agent-tls", "zerowake-keda-server-tls", "zerowake-keda-client-tls"} < certificates.keys()
    assert all(spec["issuerRef"]["name"] in issuers for spec in certificates.values())
    assert all(spec["ca"]["secretName"] in certificates for spec in issuers.values() if "ca" in spec)
    assert certificates["zerowake-agent-tls"]["issuerRef"] != certificates["zerowake-keda-client-tls"]["issuerRef"], (
        "tenants' must open no agent"
    )
    (hook,) = [one for one in objects if one["kind"] == "MutatingWebhookConfiguration"]
    assert hook["metadata"]["annotations"]["cert-manager.io/inject-ca-from"] == "zerowake/zerowake-scaler-tls"


def test_what_prometheus_operator_is_given(kubeconfig: str) -> None:
    """Its kinds are not in this cluster, so no API server is asked. The rules are the file, and each monitor finds its pods."""
    operated = {"PrometheusRule", "PodMonitor"}
    assert not [one for one in render(kubeconfig, "zerowake") if one["kind"] in operated]
    on = "--set=monitoring.rules=true,monitoring.podMonitors=true,monitoring.labels.release=mine,monitoring.interval=15s"
    objects = render(kubeconfig, "zerowake", on)
    rule, *monitors = (one for kind in sorted(operated, reverse=True) for one in objects if one["kind"] == kind)
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
    pods = [one["spec"]["template"] for one in objects if one["kind"] in ("Deployment", "DaemonSet")]
    for monitor in monitors:
        assert monitor["metadata"]["labels"]["release"] == rule["metadata"]["labels"]["release"] == "mine"
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (pod,) = [each for each in pods if wanted <= each["metadata"]["labels"].items()]
        ports = [port["name"] for container in pod["spec"]["containers"] for port in container["ports"]]
        assert (ports.count(endpoint["port"]), endpoint["interval"]) == (1, "15s")
    assert len(monitors) == 2


def test_what_grafana_is_given(kubeconfig: str) -> None:
    """The board is the file, under the label by which the sidecar of Grafana's chart finds it; none is made unless it is wished."""

    def boards(*options: str) -> list[dict[str, Any]]:
        return [one for one in render(kubeconfig, "zerowake", *options) if "grafana_dashboard" in one["metadata"].get("labels", {})]

    assert boards() == []
    (board,) = boards("--set=monitoring.board=true")
    assert board["kind"] == "ConfigMap" and board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert board["data"] == {"zerowake.json": (ROOT / "deploy/prometheus/board.json").read_text()}


def test_what_runs_with_few_rights(kubeconfig: str) -> None:
    """Only the agent's own container is privileged; all others are not root, or say why, and none can write its root file system."""
    for one in render(kubeconfig, "zerowake", *WAYS["everything"]):
        pod = one["spec"].get("template", {}).get("spec", {}) if one["kind"] in {"Deployment", "DaemonSet", "Job"} else {}
        for container in pod.get("containers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and "resources" in container
            if container["name"] == "agent":
                continue
            assert not context.get("privileged") and not context["allowPrivilegeEscalation"]
            assert context["capabilities"]["drop"] == ["ALL"]
            if container["name"] != "gpumem":
                assert context["runAsNonRoot"] and "add" not in context["capabilities"] and not pod.get("hostPID")


def test_its_certificates(kubeconfig: str, tmp_path: Path) -> None:
    objects = render(kubeconfig, "zerowake", "--set=keda.tls=mutual")
    secrets = secrets_of(objects)
    assert secrets.keys() == {"zerowake-scaler-tls", "zerowake-agent-tls", "zerowake-keda-server-tls", "zerowake-keda-client-tls"}
    assert (
        secrets["zerowake-scaler-tls"]["ca.crt"] == secrets["zerowake-agent-tls"]["ca.crt"] != secrets["zerowake-keda-client-tls"]["ca.crt"]
    )
    (hook,) = [one for one in objects if one["kind"] == "MutatingWebhookConfiguration"]
    for each in hook["webhooks"]:
        assert base64.b64decode(each["clientConfig"]["caBundle"]) == secrets["zerowake-scaler-tls"]["ca.crt"]
    for name, secret in secrets.items():
        for key, content in secret.items():
            (tmp_path / key).write_bytes(content)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
        certificate, authority = (x509.load_pem_x509_certificate(secret[key]) for key in ("tls.crt", "ca.crt"))
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
        wanted = {
            "zerowake-scaler-tls": "zerowake-webhook.zerowake.svc",
            "zerowake-agent-tls": "zerowake-agent",
            "zerowake-keda-client-tls": "keda",
        }
        assert wanted.get(name, "zerowake-scaler.zerowake.svc.cluster.local") in names
