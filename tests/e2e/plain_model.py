"""A model whose pods are plain web servers, with KEDA's part: for tests in which nothing is restored."""

from __future__ import annotations

from tests.e2e.api import Object
from tests.e2e.cluster.layout import PAUSE_IMAGE

NAME = "pause"
PORT = 8000
COOLDOWN_SECONDS = 2
POLL_SECONDS = 1


def deployment(name: str) -> Object:
    """A server that answers any path with its host's name once it has its port."""
    container = {
        "name": "engine",
        "image": PAUSE_IMAGE,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", f"hostname >/tmp/index.html; exec httpd -f -p {PORT} -h /tmp"],
        "readinessProbe": {"httpGet": {"path": "/", "port": PORT}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "8Mi"}},
    }
    pod = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 1}}
    spec = {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": pod}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def scaled_object(name: str, scaler: str, *, most: int = 3, target: float = 1) -> Object:
    metadata = {"scalerAddress": scaler, "model": name, "targetPending": str(target)}
    spec = {
        "scaleTargetRef": {"name": name},
        "pollingInterval": POLL_SECONDS,
        "cooldownPeriod": COOLDOWN_SECONDS,
        "minReplicaCount": 0,
        "maxReplicaCount": most,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}}}},
        "triggers": [{"type": "external-push", "metadata": metadata}],
    }
    return {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": name}, "spec": spec}


def replicas_of(one: Object | None) -> int:
    return int((one or {}).get("spec", {}).get("replicas", -1))
