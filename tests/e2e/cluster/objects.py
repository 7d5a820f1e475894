"""What the API server is told at the start: CoreDNS's rights, KEDA's resources and rights, and how its metrics adapter is reached."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

from tests.e2e.cluster.layout import BIN, KEDA_MANIFESTS, KUBECONFIG, SECRETS

RBAC = "rbac.authorization.k8s.io"
RBAC_VERSION = f"{RBAC}/v1"
METRICS_SERVICE = "keda-metrics-apiserver"


async def apply() -> None:
    """KEDA's custom resources are there afterwards, so that its operator finds them when it starts."""
    namespace: dict[str, object] = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "keda"}}
    first: list[dict[str, object]] = [namespace, *_coredns(), *_keda()]
    await _kubectl("apply", "--server-side", "--validate=false", "--filename=-", f"--filename={KEDA_MANIFESTS.resolve()}", documents=first)
    kinds = ["crd/scaledobjects.keda.sh", "crd/triggerauthentications.keda.sh"]
    await _kubectl("wait", "--for=jsonpath={.status.conditions}", *kinds)  # to wait for one while there are none is an error
    await _kubectl("wait", "--for=condition=Established", *kinds)


async def ready(first: str) -> None:
    await node_ready(first)
    await _kubectl("wait", "--for=condition=Available", "apiservice/v1beta1.external.metrics.k8s.io")
    # Without it no pod is admitted into the namespace.
    await _kubectl("wait", "--for=create", "serviceaccount/default")


async def node_ready(name: str) -> None:
    await _kubectl("wait", "--for=create", f"node/{name}")
    await _kubectl("wait", "--for=condition=Ready", f"node/{name}")


async def import_image(archive: Path) -> None:
    await _run([str(BIN / "ctr"), "--namespace=k8s.io", "images", "import", "--all-platforms", str(archive)])


async def _kubectl(*arguments: str, documents: list[dict[str, object]] | None = None) -> None:
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents or []})
    await _run([str(BIN / "kubectl"), f"--kubeconfig={KUBECONFIG}", *arguments], listed)


async def _run(command: list[str], standard_input: str = "") -> None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await process.communicate(standard_input.encode())
    if process.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {output.decode(errors='replace').strip()}")


def _coredns() -> list[dict[str, object]]:
    rules: list[dict[str, list[str]]] = [
        {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    name = {"name": "system:coredns"}
    return [
        {"apiVersion": RBAC_VERSION, "kind": "ClusterRole", "metadata": name, "rules": rules},
        {
            "apiVersion": RBAC_VERSION,
            "kind": "ClusterRoleBinding",
            "metadata": name,
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", **name},
            "subjects": [{"kind": "User", "apiGroup": RBAC, **name}],
        },
    ]


def _keda() -> list[dict[str, object]]:
    """Its adapter is a process of the node, not a pod: the API server reaches it at localhost."""
    authority = base64.b64encode((SECRETS / "keda-ca.crt").read_bytes()).decode()
    service = {"type": "ExternalName", "externalName": "localhost", "ports": [{"name": "https", "port": 7443}]}
    registration = {
        "service": {"name": METRICS_SERVICE, "namespace": "keda", "port": 7443},
        "group": "external.metrics.k8s.io",
        "version": "v1beta1",
        "caBundle": authority,
        "groupPriorityMinimum": 100,
        "versionPriority": 100,
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": METRICS_SERVICE, "namespace": "keda"}, "spec": service},
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
            "spec": registration,
        },
    ]
