"""What an agent shows of itself: Prometheus metrics, /healthz, /readyz. This module is the Observer of the agent's node."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin
from restore_agent.sequences.standby import Rung
from restore_agent.transfer.egress import Egress
from zerowake_shared.web_server import served

_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60, 120, 300)
# Shown by a program that has a node, and not by every one that has loaded its commands.
_OURS = CollectorRegistry()
_RESTORES = Counter(
    "zerowake_restores_total",
    "Replicas made, by how: restored, standby and parked (it was woken) or cold",
    ["model", "origin"],
    registry=_OURS,
)
_FALLBACKS = Counter(
    "zerowake_restore_fallbacks_total", "Snapshots that were asked for and not restored, by reason", ["model", "reason"], registry=_OURS
)
_PHASES = Histogram(
    "zerowake_restore_phase_seconds", "Where a restore's time goes", ["model", "origin", "phase"], buckets=_BUCKETS, registry=_OURS
)
_REPLICAS = Gauge("zerowake_node_replicas", "Replicas that live on this node", registry=_OURS)
_STANDBYS = Gauge("zerowake_node_standbys", "Replicas that only have to be woken, by rung: standby or parked", ["rung"], registry=_OURS)
_SLEEPERS = Gauge("zerowake_node_sleeping_pods", "Replicas that sleep in their pods, by rung: standby or parked", ["rung"], registry=_OURS)
_PARKED = Gauge("zerowake_node_parked_bytes", "GPU memory that parked replicas hold, in pods as well", ["gpu"], registry=_OURS)


class _Sent(Collector):
    """What was sent to other agents is counted where it is sent."""

    def __init__(self) -> None:
        self.egress: Egress | None = None

    def collect(self) -> Iterator[CounterMetricFamily]:
        if self.egress:
            sent = CounterMetricFamily("zerowake_peer_sent_bytes", "Bytes that this agent has sent to other agents")
            sent.add_metric([], self.egress.sent)
            yield sent


_SENT = _Sent()
_OURS.register(_SENT)


def count_sent(egress: Egress) -> None:
    _SENT.egress = egress


def restored(model: str, origin: Origin, phases: Iterable[tuple[str, float]]) -> None:
    _RESTORES.labels(model, origin.value).inc()
    for name, seconds in phases:
        _PHASES.labels(model, origin.value, name).observe(seconds)


def started_cold(model: str) -> None:
    _RESTORES.labels(model, Origin.COLD.value).inc()


def fell_back(model: str, reason: str) -> None:
    _FALLBACKS.labels(model, reason).inc()


def replicas_are(count: int) -> None:
    _REPLICAS.set(count)


def standbys_are(counts: Mapping[Rung, int], parked: Mapping[str, int]) -> None:
    for rung, count in counts.items():
        _STANDBYS.labels(rung.value).set(count)
    _PARKED.clear()
    for gpu, size in parked.items():
        _PARKED.labels(gpu).set(size)


def sleepers_are(counts: Mapping[Rung, int]) -> None:
    for rung, count in counts.items():
        _SLEEPERS.labels(rung.value).set(count)


class NodeCollector(Collector):
    """What was counted, and what the node knows anyway, read when Prometheus asks. It names as many sources as the node remembers."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        yield from _OURS.collect()
        staged = GaugeMetricFamily("zerowake_node_staged_bytes", "Memory of images that stand in it or are on their way there")
        staged.add_metric([], self._node.staging.held_bytes)
        gpus = GaugeMetricFamily("zerowake_node_gpu_bytes", "Memory of a GPU, by who has it", labels=["gpu", "holder"])
        for gpu in self._node.inventory.gpus:
            held = {"nobody": gpu.unused_bytes, "gpumem": gpu.pool_bytes, "parked": gpu.parked_bytes, "others": gpu.others_bytes}
            for holder, size in held.items():
                if size is not None:
                    gpus.add_metric([gpu.uuid, holder], size)
        rate = GaugeMetricFamily(
            "zerowake_node_source_bytes_per_second",
            "What a store or another agent gave while it was read from, smoothed",
            labels=["source"],
        )
        fails = GaugeMetricFamily(
            "zerowake_node_source_fails", "1: the store or other agent gave nothing when it was asked last", labels=["source"]
        )
        for source in self._node.travel.sources:
            rate.add_metric([source.name], source.bandwidth.rate)
            fails.add_metric([source.name], bool(source.fault))
        yield from (staged, gpus, rate, fails)


@contextlib.contextmanager
def shown(node: Node) -> Iterator[None]:
    """What the node has is among the metrics until the block ends."""
    collector = NodeCollector(node)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


@contextlib.asynccontextmanager
async def serve(host: str, port: int) -> AsyncIterator[int]:
    """Serves /metrics, /healthz and /readyz; yields the port. The agent is ready as long as it runs: it has no other state.

    Raises CannotListen.
    """

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def fine(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", show), web.get("/healthz", fine), web.get("/readyz", fine)])
    async with served(app, host, port, "the agent's metrics' server") as (_, bound):
        yield bound
