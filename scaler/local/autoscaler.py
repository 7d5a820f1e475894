"""The autoscaler of a single machine: KEDA's operator and the Horizontal Pod Autoscaler in one, over the same ExternalScaler service.

It is a gRPC client like KEDA, on one channel for all objects: `StreamIsActive` and a poll (GetMetricSpec, GetMetrics, IsActive) activate,
the poll deactivates after the cooldown, and an HPA sync every 15 s chooses a number above zero. The rules are in scaler/books/hpa.py.
What differs from KEDA, and why:
- An HPA sync follows each activation and each `true` at once, and again after 50, 100, 200 ms and so on until the interval is 15 s again:
  the push for a burst's first request comes before the rest of the burst, and a backlog worth N replicas should not wait 15 s for them.
- In the 15 s after an activation the scale-up policies (4 replicas or 100 % in 15 s) are not applied: they damp the noise of metrics
  measured on running replicas, while a backlog at zero is a count of people who wait.
- A stream is opened again after 0.1 s, doubling to 5 s, instead of 2 s to 60 s: the scaler is on the same machine and has one client.
- Unary calls have a deadline, since nothing else here would notice a hung one.
- The last active time does not survive a restart, so it begins at the start; KEDA, finding none, would scale to zero without a cooldown.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import grpc
from zerowake_proto import externalscaler_pb2 as pb
from zerowake_proto import externalscaler_pb2_grpc as pb_grpc

from scaler.books.hpa import POLICY_SECONDS, SYNC_SECONDS, Hpa, ScalingRules, activation
from scaler.books.trigger import parse_trigger
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

CALL_SECONDS = 10.0
FIRST_SYNC_SECONDS = 0.05
FIRST_RETRY_SECONDS = 0.1
LAST_RETRY_SECONDS = 5.0


def dial(address: str) -> grpc.aio.Channel:
    """A channel to a scaler on this machine: it is tried again soon when it is not there."""
    options = [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    return grpc.aio.insecure_channel(address, options)


class Target(Protocol):
    """What is scaled, like a Deployment: a wish that the target brings about by itself."""

    def replicas(self) -> int:
        """The number wished for, as a Deployment's `spec.replicas`: it follows `scale` at once, whatever lives yet."""

    async def scale(self, replicas: int) -> None:
        """Wishes for `replicas`. Any exception means that the wish was not taken; it is made again later."""


class ScaledTarget:
    """One target under its rules, what a ScaledObject is to KEDA.

    `name` is for logs and for the scaler; `metadata` is the trigger's, as in KEDA.
    """

    def __init__(self, name: str, metadata: Mapping[str, str], rules: ScalingRules, target: Target, clock: Clock = SYSTEM_CLOCK) -> None:
        parse_trigger(metadata)
        self.name = name
        self.rules = rules
        self.target = target
        self._clock = clock
        self._ref = pb.ScaledObjectRef(name=name, namespace="local", scalerMetadata=dict(metadata))
        self._hpa = Hpa(rules)
        self._spec: pb.MetricSpec | None = None
        self._last_active = clock.now()
        self._activated: float | None = None
        self._lock = asyncio.Lock()  # one decision at a time, as KEDA and the API server have it
        self._hurry = asyncio.Event()
        self._unreachable = ""

    async def run(self, stub: pb_grpc.ExternalScalerAsyncStub) -> None:
        """Scales the target until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(stub), name=f"pushes for {self.name}")
            group.create_task(self._poll(stub), name=f"polls for {self.name}")
            group.create_task(self._sync(stub), name=f"HPA of {self.name}")

    async def _listen(self, stub: pb_grpc.ExternalScalerAsyncStub) -> None:
        backoff = Backoff(FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS)
        while True:
            try:
                async for response in stub.StreamIsActive(self._ref):
                    if response.result:
                        await self._decide(active=True, failed=False)
                        self._hurry.set()
                    backoff.reset()
                backoff.reset()
            except grpc.aio.AioRpcError as error:
                self._note(error)
            await asyncio.sleep(backoff.next())

    async def _poll(self, stub: pb_grpc.ExternalScalerAsyncStub) -> None:
        while True:
            active = failed = False
            try:
                # As KEDA does: the specs anew, and the metric, whose failure is what keeps the replicas of an unknown model.
                self._spec = await self._ask_spec(stub)
                await self._metric(stub, self._spec)
                active = (await stub.IsActive(self._ref, timeout=CALL_SECONDS)).result
                self._note(None)
            except grpc.aio.AioRpcError as error:
                failed = True
                self._note(error)
            if await self._decide(active=active, failed=failed):
                self._hurry.set()
            await asyncio.sleep(self.rules.polling_seconds)

    async def _sync(self, stub: pb_grpc.ExternalScalerAsyncStub) -> None:
        interval = SYNC_SECONDS
        while True:
            try:
                async with asyncio.timeout(interval):
                    await self._hurry.wait()
                self._hurry.clear()
                interval = FIRST_SYNC_SECONDS
            except TimeoutError:
                interval = min(2 * interval, SYNC_SECONDS)
            if self.target.replicas() == 0:
                continue
            try:
                spec = self._spec = self._spec or await self._ask_spec(stub)
                total = await self._metric(stub, spec)
            except grpc.aio.AioRpcError as error:
                self._note(error)
                continue
            await self._adjust(total, spec.targetSizeFloat)

    async def _ask_spec(self, stub: pb_grpc.ExternalScalerAsyncStub) -> pb.MetricSpec:
        return (await stub.GetMetricSpec(self._ref, timeout=CALL_SECONDS)).metricSpecs[0]

    async def _metric(self, stub: pb_grpc.ExternalScalerAsyncStub, spec: pb.MetricSpec) -> float:
        request = pb.GetMetricsRequest(scaledObjectRef=self._ref, metricName=spec.metricName)
        return (await stub.GetMetrics(request, timeout=CALL_SECONDS)).metricValues[0].metricValueFloat

    async def _decide(self, *, active: bool, failed: bool) -> bool:
        """KEDA's part: between zero (or idle) and the first replicas. True if it asked for other replicas."""
        async with self._lock:
            now, current = self._clock.now(), self.target.replicas()
            wish = activation(self.rules, active=active, failed=failed, replicas=current, idle_seconds=now - self._last_active)
            if active:
                self._last_active = now
            if wish is None or not await self._scale(current, wish, "KEDA's rules"):
                return False
            if active:
                self._activated = now
            return True

    async def _adjust(self, total: float, target: float) -> None:
        """The HPA's part: how many, above zero."""
        async with self._lock:
            now, current = self._clock.now(), self.target.replicas()
            catching_up = self._activated is not None and now - self._activated < POLICY_SECONDS
            wish = self._hpa.desired(current=current, total=total, target=target, now=now, limited=not catching_up)
            if wish != current and await self._scale(current, wish, f"{total:g} requests pending, {target:g} a replica"):
                self._hpa.changed(current, wish, now)

    async def _scale(self, current: int, wish: int, why: str) -> bool:
        try:
            await self.target.scale(wish)
        except Exception:
            log.exception("%s could not be scaled from %d to %d; tried again when next decided", self.name, current, wish)
            return False
        log.info("%s scaled from %d to %d (%s)", self.name, current, wish, why)
        return True

    def _note(self, error: grpc.aio.AioRpcError | None) -> None:
        """Logs trouble with the scaler once, not at each call, and its end."""
        trouble = f"{error.code().name}: {error.details()}" if error else ""
        if trouble and trouble != self._unreachable:
            log.warning("%s keeps its replicas while the scaler cannot be asked (%s)", self.name, trouble)
        elif self._unreachable and not trouble:
            log.info("%s: the scaler answers again", self.name)
        self._unreachable = trouble


class Autoscaler:
    """Scales objects by what the scaler at the other end of `channel` says, from `async with` to its end.

    A bug in one object's rules ends the whole block with its error: a model that silently stops being scaled is the worse outcome.
    """

    def __init__(self, channel: grpc.aio.Channel, clock: Clock = SYSTEM_CLOCK) -> None:
        self._stub: pb_grpc.ExternalScalerAsyncStub = pb_grpc.ExternalScalerStub(channel)
        self._clock = clock
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def add(self, name: str, metadata: Mapping[str, str], rules: ScalingRules, target: Target) -> None:
        """Begins to scale `target`.

        Raises:
            BadTrigger: the metadata cannot be used.
        """
        scaled = ScaledTarget(name, metadata, rules, target, self._clock)
        self._tasks.append(self._group.create_task(scaled.run(self._stub), name=f"autoscaling of {name}"))
