"""What an agent shows of itself: Prometheus metrics, /healthz, /readyz. This module is the Observer of the agent's node."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

from aiohttp import web
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from restore_agent.drivers.weights_view import WeightsView
from restore_agent.sequences.node import Node
from restore_agent.sequences.replicas import Origin
from restore_agent.sequences.standby import Rung
from restore_agent.transfer.egress import Egress
from zerowake_shared.metrics_page import metrics_page
from zerowake_shared.web_server import served

_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60, 120, 300)
_LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
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
_FOUND = Counter(
    "zerowake_restore_rungs_total",
    "Replicas made of a snapshot, by the rung on which it was found: parked, standby, memory, disk, or remote, which it was waited from",
    ["model", "rung"],
    registry=_OURS,
)
_CAPTURES = Histogram(
    "zerowake_capture_seconds", "Snapshots taken and proved, from the engine's start on", ["model"], buckets=_LONG, registry=_OURS
)
_CAPTURE_FAILURES = Counter(
    "zerowake_capture_failures_total", "Captures that came to nothing, by reason", ["model", "reason"], registry=_OURS
)
_STAGED = Counter(
    "zerowake_staged_bytes_total",
    "Bytes that went up to a rung: disk (fetched), memory (images), gpu (weights, ahead of a restore)",
    ["rung"],
    registry=_OURS,
)
_STAGING = Histogram("zerowake_staging_seconds", "How long one snapshot took to a rung", ["rung"], buckets=_LONG, registry=_OURS)
_STAGING_FAILURES = Counter(
    "zerowake_staging_failures_total", "Snapshots that did not come to a rung, by reason", ["rung", "reason"], registry=_OURS
)
for _rung in ("disk", "memory", "gpu"):  # none is 0, and not no answer
    _STAGED.labels(_rung)
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


def restored(model: str, origin: Origin, phases: Iterable[tuple[str, float]], stood: str) -> None:
    _RESTORES.labels(model, origin.value).inc()
    _FOUND.labels(model, stood).inc()
    for name, seconds in phases:
        _PHASES.labels(model, origin.value, name).observe(seconds)


def started_cold(model: str) -> None:
    _RESTORES.labels(model, Origin.COLD.value).inc()


def fell_back(model: str, reason: str) -> None:
    _FALLBACKS.labels(model, reason).inc()


def captured(model: str, seconds: float) -> None:
    _CAPTURES.labels(model).observe(seconds)


def capture_failed(model: str, reason: str) -> None:
    _CAPTURE_FAILURES.labels(model, reason).inc()


def staged(rung: str, size: int, seconds: float) -> None:
    _STAGED.labels(rung).inc(size)
    _STAGING.labels(rung).observe(seconds)


def staging_failed(rung: str, reason: str) -> None:
    _STAGING_FAILURES.labels(rung, reason).inc()


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
        fetched = CounterMetricFamily("zerowake_fetched_bytes", "Bytes that came from stores and from other agents", labels=["kind"])
        for kind, size in self._node.travel.sources.bytes.items():
            fetched.add_metric([kind], size)
        snapshots = GaugeMetricFamily(
            "zerowake_node_snapshots",
            "Names of snapshots on this disk, by what is behind them: a whole one, or why it cannot be used",
            labels=["state"],
        )
        for state, count in self._node.inventory.snapshots.items():
            snapshots.add_metric([state], count)
        yield from (staged, gpus, rate, fails, fetched, snapshots)
        yield from _gpumem(self._node.weights.view)


def _gpumem(view: WeightsView) -> Iterator[Metric]:
    """What gpumem said last. Without one there is nothing to show; of one that says nothing, that it does not."""
    status = view.status
    if status is None and not view.is_silent:
        return
    up = GaugeMetricFamily("zerowake_gpumem_up", "1: gpumem says what it holds; 0: there is one, and it does not answer")
    up.add_metric([], status is not None)
    yield up
    if status is None:
        return
    wanted = GaugeMetricFamily("zerowake_gpumem_wanted_bytes", "What gpumem is to hold of a device", labels=["gpu"])
    held = GaugeMetricFamily(
        "zerowake_gpumem_held_bytes",
        "What gpumem holds of a device: free, idle (weights that it gives up for others), weights (in use or pinned), scratch (lent)",
        labels=["gpu", "use"],
    )
    owed = GaugeMetricFamily(
        "zerowake_gpumem_owed_bytes", "What gpumem is to hold of a device, and the device does not give it", labels=["gpu"]
    )
    restarts = CounterMetricFamily(
        "zerowake_gpumem_filler_restarts", "Fillers of a device that died and were started again", labels=["gpu"]
    )
    for device in status.devices:
        gpu = device.identity
        idle = sum(each.size for each in status.regions if each.device == gpu and not each.leases and not each.pinned)
        uses = {"free": device.free_bytes, "idle": idle, "weights": device.regions_bytes - idle, "scratch": device.scratch_bytes}
        wanted.add_metric([gpu], device.wanted_bytes)
        owed.add_metric([gpu], device.owed_bytes)
        restarts.add_metric([gpu], device.filler_restarts)
        for use, size in uses.items():
            held.add_metric([gpu, use], size)
    arena = GaugeMetricFamily(
        "zerowake_gpumem_arena_bytes",
        "gpumem's piece of host memory: free, idle (chunks that go when their room is wanted), held (pinned, or on their way)",
        labels=["use"],
    )
    arena.add_metric(["free"], status.arena_bytes - status.arena_used_bytes)
    arena.add_metric(["idle"], status.arena_idle_bytes)
    arena.add_metric(["held"], status.arena_used_bytes - status.arena_idle_bytes)
    connections = GaugeMetricFamily("zerowake_gpumem_connections", "Clients of gpumem")
    connections.add_metric([], status.connections)
    yield from (wanted, held, owed, restarts, arena, connections)


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

    async def show(request: web.Request) -> web.Response:
        return metrics_page(request)

    async def fine(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", show), web.get("/healthz", fine), web.get("/readyz", fine)])
    async with served(app, host, port, "the agent's metrics' server") as (_, bound):
        yield bound
