"""The chart, as tests render and install it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.api import Api, Object, condition
from tests.e2e.cluster.layout import BIN

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/zerowake"
CRD = "modelsnapshots.zerowake.dev"


def run(kubeconfig: str, *command: str, seconds: float = 300, given: str = "") -> str:
    """What kubectl or helm printed. Raises: AssertionError with all it said."""
    where = {**os.environ, "KUBECONFIG": kubeconfig, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=where, input=given, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout


def render(kubeconfig: str, namespace: str, *options: str) -> list[Object]:
    text = run(kubeconfig, "helm", "template", "zerowake", str(CHART), "--namespace", namespace, *options)
    return [one for one in yaml.safe_load_all(text) if one]


@asynccontextmanager
async def definition(api: Api, kubeconfig: str) -> AsyncIterator[None]:
    """ModelSnapshots are known to the cluster; to begin with, if they were, as this checkout's chart has them."""
    found = [one for one in await api.list("CustomResourceDefinition") if one["metadata"]["name"] == CRD]
    if any(one["metadata"].get("deletionTimestamp") for one in found):  # another test's, which is still going
        await api.until("CustomResourceDefinition", "", CRD, lambda one: one is None, within=180)
        found = []
    (crd,) = [one for one in render(kubeconfig, "zerowake") if one["kind"] == "CustomResourceDefinition"]
    if not found or not found[0]["metadata"].get("annotations", {}).get("meta.helm.sh/release-name"):
        await api.apply(crd)
        await api.until("CustomResourceDefinition", "", CRD, lambda one: condition(one, "Established"))
    try:
        yield
    finally:
        if not found:
            await api.delete("CustomResourceDefinition", "", CRD)
            await api.until("CustomResourceDefinition", "", CRD, lambda one: one is None, within=180)


def secrets_of(objects: list[Object]) -> dict[str, dict[str, bytes]]:
    """The contents of the certificates' Secrets among them, by name."""
    return {
        one["metadata"]["name"]: {key: base64.b64decode(value) for key, value in one["data"].items()}
        for one in objects
        if one.get("type") == "kubernetes.io/tls"
    }


async def everything(kubeconfig: str, namespace: str) -> set[str]:
    """What an install could leave behind: every object of no namespace, of this one and of KEDA's, but what only time takes away."""
    kinds = await asyncio.to_thread(run, kubeconfig, "kubectl", "api-resources", "--verbs=list", "--output=name")
    skipped = {"events", "events.events.k8s.io", "ipaddresses.networking.k8s.io", "namespaces"}
    wanted = ",".join(sorted(kind for kind in kinds.split() if kind not in skipped and "metrics.k8s.io" not in kind))
    command = ("kubectl", "get", wanted, "--all-namespaces", "--output=json", "--ignore-not-found")
    found: Any = json.loads(await asyncio.to_thread(run, kubeconfig, *command))
    return {
        f"{one['apiVersion'].rpartition('/')[0]}/{one['kind']}/{one['metadata'].get('namespace', '')}/{one['metadata']['name']}"
        for one in found["items"]
        if one["metadata"].get("namespace", "") in ("", namespace, "keda")
    }
