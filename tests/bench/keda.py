"""KEDA itself: from a model's first request to its Deployment scaled from zero, with 1, 100 and 1,000 ScaledObjects.

The cluster of `make cluster`: the real operator, adapter and API server. The scaler runs in a process of its own on this machine. A
request's time is taken in that process just before the ledger learns of it; the Deployment's change is read here, from a watch; both by
CLOCK_MONOTONIC. The Deployments are paused: no pod is made, so that the kubelet's work is not in the figures.
One object is used over and over, waiting for KEDA to scale it to zero again; of many each is used once, chosen at random.
"""

from __future__ import annotations

import asyncio
import random
import time

from tests.bench.figures import Figure
from tests.bench.push import busy, memory
from tests.e2e.api import Api, Object
from tests.e2e.cluster.control import NOT_RUNNING, ControlError, current, running
from tests.e2e.cluster.layout import KUBECONFIG, PAUSE_IMAGE
from tests.e2e.release import own_namespace
from tests.worlds.scaler_process import ScalerProcess, models, scaler_process

OBJECTS = (1, 100, 1000)
REQUESTS = {1: 30, 100: 90, 1000: 200}
POLL_SECONDS = {1: 1, 100: 30, 1000: 30}  # 30 s is KEDA's default
IDLE_SECONDS = 60.0
SETUP_SECONDS = 1200.0
PACE_SECONDS = 0.5  # between requests: each costs KEDA half a dozen calls, and its own limit is 20 a second
AT_ONCE = 20  # requests to the API server while objects are made


def unavailable() -> str:
    """Why this cannot be measured here; empty: it can."""
    return "" if running() else NOT_RUNNING


async def main() -> list[Figure]:
    if reason := unavailable():
        raise ControlError(reason)
    figures = []
    async with Api.connect(str(KUBECONFIG)) as api:
        for objects in OBJECTS:
            figures += await measure(api, objects)
    return figures


async def measure(api: Api, count: int) -> list[Figure]:
    async with scaler_process(f"{current().machine}:0", count) as scaler, own_namespace(api, "bench", SETUP_SECONDS) as namespace:
        bare = memory(scaler.process.pid)
        began = time.monotonic()
        await make(api, namespace, count, scaler.address)
        await scaler.do("watched", within=SETUP_SECONDS)
        setup = time.monotonic() - began
        share = await busy(scaler.process.pid, asyncio.sleep(IDLE_SECONDS))
        grown = memory(scaler.process.pid) - bare
        seconds = await first_requests(api, namespace, scaler, count)
    ordered = sorted(seconds)
    named = f"{count:,} ScaledObject{'s' if count > 1 else ''}"
    middle, high = (1000 * ordered[min(len(ordered) - 1, round(part * len(ordered)))] for part in (0.5, 0.99))
    detail = f"{len(ordered)} requests, {PACE_SECONDS:g} s apart; least {1000 * ordered[0]:.1f}, worst {1000 * ordered[-1]:.1f} ms"
    every = f"polled every {POLL_SECONDS[count]} s"
    return [
        Figure(f"first request → Deployment scaled by KEDA, p50, {named}", middle, "ms", detail=detail),
        Figure(f"first request → Deployment scaled by KEDA, p99, {named}", high, "ms", detail=detail),
        Figure(f"scaler's processor time under KEDA, {named}", 100 * share, "% of a core", detail=f"{every}; over {IDLE_SECONDS:g} s"),
        Figure(f"scaler's memory under KEDA, {named}", (bare + grown) / 2**20, "MiB", detail=f"resident; {bare / 2**20:.0f} MiB before"),
        Figure(f"ScaledObjects made → KEDA listens to all, {named}", setup, "s"),
    ]


async def make(api: Api, namespace: str, count: int, scaler: str) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> None:
        async with gate:
            await api.apply(deployment(name), scaled_object(name, scaler, POLL_SECONDS[count]), namespace=namespace)

    await asyncio.gather(*(one(name) for name in models(count)))


def deployment(name: str) -> Object:
    container = {"name": "engine", "image": PAUSE_IMAGE, "imagePullPolicy": "Never"}
    pod = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container]}}
    spec = {"replicas": 0, "paused": True, "selector": {"matchLabels": {"app": name}}, "template": pod}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def scaled_object(name: str, scaler: str, poll_seconds: int) -> Object:
    spec = {
        "scaleTargetRef": {"name": name},
        "pollingInterval": poll_seconds,
        "cooldownPeriod": 1,
        "maxReplicaCount": 1,
        "triggers": [{"type": "external-push", "metadata": {"scalerAddress": scaler, "model": name}}],
    }
    return {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": name}, "spec": spec}


async def first_requests(api: Api, namespace: str, scaler: ScalerProcess, count: int) -> list[float]:
    """Seconds until the Deployment was scaled, of one request after the other."""
    wanted = REQUESTS[count]
    names = models(count)
    chosen = random.sample(names, wanted) if count > 1 else names * wanted
    changes: asyncio.Queue[tuple[float, str, int]] = asyncio.Queue()

    async def follow() -> None:
        async for _, one in api.watch("Deployment", namespace):
            await changes.put((time.monotonic(), one["metadata"]["name"], one["spec"]["replicas"]))

    async def reached(name: str, replicas: int) -> float:
        async with asyncio.timeout(120):
            while True:
                when, changed, now = await changes.get()
                if (changed, now) == (name, replicas):
                    return when

    seconds = []
    following = asyncio.create_task(follow())
    try:
        for name in chosen:
            asked = await scaler.do("hold", [name])
            seconds.append(await reached(name, 1) - asked)
            await scaler.do("leave", [name])
            if count == 1:
                await reached(name, 0)
            await asyncio.sleep(PACE_SECONDS)
    finally:
        following.cancel()
    return seconds
