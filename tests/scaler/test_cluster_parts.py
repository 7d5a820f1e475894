"""What a bug report has of a cluster, with secrets planted in its objects and logs."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.worlds.command import zerowake
from tests.worlds.kubernetes_api import Api

S = "Planted-s3cret-"
PODS = "/api/v1/namespaces/zerowake/pods"
ENV = [{"name": "HF_TOKEN", "value": f"{S}variable"}, {"name": "B", "valueFrom": {"secretKeyRef": {"name": "models", "key": "b"}}}]


async def test_objects_events_logs_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api()
    async with api.serve(tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))

        async def put(plural: str, name: str, namespace: str, labels: dict[str, str] | None = None, **parts: Any) -> None:
            await api.put(plural, {"metadata": {"name": name, "namespace": namespace, "labels": labels or {}}, **parts})

        applied = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps({"x": f"{S}applied"})}
        template = {"spec": {"containers": [{"name": "engine", "env": ENV, "args": ["--api-key", f"{S}argument"]}]}}
        await put("modelsnapshots", "chat", "models", spec={"template": template})
        await api.change("modelsnapshots", "models", "chat", {"metadata": {"annotations": applied}})
        await put("scaledobjects", "chat", "models", spec={"triggers": [{"metadata": {"password": f"{S}trigger"}}]})
        await put("events", "e1", "models", reportingController="zerowake.dev/scaler", note=f"pulled https://u:{S}note@r/")
        await put("events", "e2", "models", reportingController="kubelet", regarding={"kind": "Pod", "name": "other"}, note="not ours")
        containers = {"containers": [{"name": "scaler", "env": ENV}]}
        restarted = {"containerStatuses": [{"name": "scaler", "restartCount": 1}]}
        await put("pods", "scaler-0", "zerowake", {"app.kubernetes.io/name": "zerowake-scaler"}, spec=containers, status=restarted)
        await put("pods", "chat-1", "models", {"zerowake.dev/snapshot": "chat"}, spec={"containers": [{"name": "engine", "env": ENV}]})
        await put("pods", "other", "models", {"app": "other"}, spec={})
        await put("secrets", "models", "models", data={"b": f"{S}secret"})
        await put("configmaps", "zerowake-scaler", "zerowake", data={"zerowake.yaml": f"namespace: zerowake\ntoken: {S}config\n"})
        api.texts[f"{PODS}/scaler-0/log"] = f"2026-11-28T08:00:00Z Authorization: Bearer {S}log\nand {S}variable\n"
        api.texts[f"{PODS}/scaler-0:9090/proxy/metrics"] = "zerowake_up 1\n"
        printed = await zerowake("bundle", "--kubernetes", "--to", str(tmp_path / "b.tar.gz"))
    with tarfile.open(tmp_path / "b.tar.gz") as archive:
        files = {name.removeprefix("b/kubernetes/"): archive.extractfile(name).read().decode() for name in archive.getnames()}  # type: ignore[union-attr]
    for name, text in files.items():
        assert S not in text, (name, text[max(0, text.index(S) - 100) : text.index(S) + 50])
    assert {"logs/scaler-0/scaler.log", "logs/scaler-0/scaler.before.log", "metrics/scaler-0.txt", "nodes.json"} <= files.keys()
    assert files["metrics/scaler-0.txt"] == "zerowake_up 1\n"

    def listed(name: str) -> list[str]:
        return [each["metadata"]["name"] for each in json.loads(files[f"{name}.json"])]

    assert [listed(name) for name in ("modelsnapshots", "scaledobjects", "events")] == [["chat"], ["chat"], ["e1"]]
    assert listed("pods") == ["chat-1", "scaler-0"]
    assert "HF_TOKEN" in files["pods.json"]
    assert not [path for _, path in api.requests if "/secrets" in path and "zerowake-scaler-tls" not in path]
    assert "written to" in printed


async def test_what_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    printed = await zerowake("bundle", "--kubernetes", "--to", str(tmp_path / "b.tar.gz"))
    assert "left out: pods' logs and metrics: Kubernetes' API cannot be found" in printed
