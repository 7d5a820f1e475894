"""A client that behaves towards an external scaler as KEDA's operator does, version 2.21: what the contract tests hold the scaler to.

One channel an address for all objects, round_robin, no deadlines. Two streams an object: StreamIsActive, of which only `true` counts, and
StreamMetricSpec. A stream that ended is opened again after 2 s, doubling to 60 s, and only a clean end sets that back (for StreamMetricSpec
also a first message). A poll asks GetMetricSpec, GetMetrics and IsActive; an HPA sync the last two.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
from zerowake_proto import externalscaler_pb2 as pb
from zerowake_proto import externalscaler_pb2_grpc as pb_grpc

from zerowake_shared.backoff import Backoff

SERVICE_CONFIG = '{"loadBalancingConfig": [{"round_robin":{}}]}'


def ref(model: str, namespace: str = "default", **metadata: str) -> pb.ScaledObjectRef:
    """A ScaledObject whose trigger scales `model`, with what KEDA forwards of its own."""
    own = {"scalerAddress": "scaler.zerowake:9090", "model": model}
    return pb.ScaledObjectRef(name=f"{model}-object", namespace=namespace, scalerMetadata=own | metadata)


@dataclass
class Watched:
    """One object's streams, seen from KEDA: when each `true` arrived, the specs, and how each StreamIsActive ended (None: cleanly)."""

    ref: pb.ScaledObjectRef
    trues: asyncio.Queue[float] = field(default_factory=asyncio.Queue)
    specs: asyncio.Queue[pb.GetMetricSpecResponse] = field(default_factory=asyncio.Queue)
    opened: asyncio.Queue[float] = field(default_factory=asyncio.Queue)
    ends: asyncio.Queue[grpc.StatusCode | None] = field(default_factory=asyncio.Queue)

    async def true(self, within: float = 10.0) -> float:
        """The time of the next `true`, taken from the queue."""
        async with asyncio.timeout(within):
            return await self.trues.get()


class Keda:
    """`backoff` in seconds, first and last; KEDA's own are 2 and 60."""

    def __init__(
        self, address: str, credentials: grpc.ChannelCredentials | None = None, backoff: tuple[float, float] = (2.0, 60.0)
    ) -> None:
        options = [("grpc.service_config", SERVICE_CONFIG), ("grpc.use_local_subchannel_pool", 1)]
        plain = grpc.aio.insecure_channel
        self.channel = grpc.aio.secure_channel(address, credentials, options) if credentials else plain(address, options)
        self.stub = pb_grpc.ExternalScalerStub(self.channel)
        self._backoff = backoff
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.channel.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    def watch(self, ref: pb.ScaledObjectRef, specs: bool = True) -> Watched:
        """Opens the streams of an object, and keeps opening them."""
        watched = Watched(ref)
        self._tasks.add(asyncio.create_task(self._run_is_active(watched)))
        if specs:
            self._tasks.add(asyncio.create_task(self._run_metric_spec(watched)))
        return watched

    async def poll(self, ref: pb.ScaledObjectRef) -> tuple[float, bool]:
        """The metric's value and whether the object is active, as the scale loop learns them."""
        spec = await self.stub.GetMetricSpec(ref)
        return await self.sync(ref, spec.metricSpecs[0].metricName)

    async def sync(self, ref: pb.ScaledObjectRef, metric: str) -> tuple[float, bool]:
        """What the HPA's request through the metrics server asks."""
        values = (await self.stub.GetMetrics(pb.GetMetricsRequest(scaledObjectRef=ref, metricName=metric))).metricValues
        assert len(values) == 1
        active = await self.stub.IsActive(ref)
        return values[0].metricValueFloat if values[0].metricValueFloat > 0 else float(values[0].metricValue), active.result

    async def _run_is_active(self, watched: Watched) -> None:
        retry = Backoff(*self._backoff)
        while True:
            try:
                call = self.stub.StreamIsActive(watched.ref)
                watched.opened.put_nowait(time.monotonic())
                async for response in call:
                    if response.result:
                        watched.trues.put_nowait(time.monotonic())
                watched.ends.put_nowait(None)
                retry.reset()
            except grpc.aio.AioRpcError as error:
                watched.ends.put_nowait(error.code())
            await asyncio.sleep(retry.next())

    async def _run_metric_spec(self, watched: Watched) -> None:
        retry = Backoff(*self._backoff)
        while True:
            try:
                async for response in self.stub.StreamMetricSpec(watched.ref):
                    watched.specs.put_nowait(response)
                    retry.reset()
                retry.reset()
            except grpc.aio.AioRpcError as error:
                assert error.code() != grpc.StatusCode.UNIMPLEMENTED
            await asyncio.sleep(retry.next())
