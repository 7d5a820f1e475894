"""KEDA gone wild: thousands of streams opened and dropped, for models that there are and for many that there are not, and storms of calls.
The scaler is a process of its own; what is counted is what it has left of it."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from zerowake_proto import externalscaler_pb2 as pb
from zerowake_proto import externalscaler_pb2_grpc as pb_grpc

from scaler.keda.external_scaler import METRIC, SERVICE
from tests.worlds.keda_client import Keda, ref
from tests.worlds.processes import descriptors, resident
from tests.worlds.scaler_process import models, scaler_process

MODELS = 50
STREAMS = 1000  # of one round
ROUNDS = 4
CALLS = 2000  # in one instant, as after KEDA was started again


async def _dropped(address: str, first: int) -> None:
    """Opens as many streams on one connection, half of them for models that nobody declared, and closes that in the middle of all."""
    channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
    stub = pb_grpc.ExternalScalerStub(channel)
    known = models(MODELS)
    calls = [stub.StreamIsActive(ref(known[number % MODELS] if number % 2 else f"made-up-{first + number}")) for number in range(STREAMS)]
    reading = [asyncio.ensure_future(call.read()) for call in calls]
    await stub.IsActive(ref(known[0]))  # answered, though it came behind all of these
    for call in calls[: STREAMS // 2]:
        call.cancel()
    await channel.close()
    await asyncio.gather(*reading, return_exceptions=True)


async def test_the_scaler_stays_answerable_and_nothing_is_left() -> None:
    async with scaler_process("127.0.0.1:0", MODELS) as scaler, asyncio.timeout(120), Keda(scaler.address) as keda:
        pid = scaler.process.pid
        await _dropped(scaler.address, 0)
        await keda.stub.IsActive(ref(models(MODELS)[0]))
        before, open_before = resident(pid), len(descriptors(pid))
        for number in range(1, ROUNDS):
            await _dropped(scaler.address, number * STREAMS)
        called = await asyncio.gather(
            *(
                keda.stub.GetMetrics(
                    pb.GetMetricsRequest(
                        scaledObjectRef=ref(models(MODELS)[number % MODELS] if number % 2 else f"no-{number}"), metricName=METRIC
                    )
                )
                for number in range(CALLS)
            ),
            return_exceptions=True,
        )
        refused = [each for each in called if isinstance(each, grpc.aio.AioRpcError)]
        assert {each.code() for each in refused} == {grpc.StatusCode.NOT_FOUND}
        assert len(refused) == CALLS // 2
        healthy = await health_pb2_grpc.HealthStub(keda.channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert healthy.status == health_pb2.HealthCheckResponse.SERVING
        # A push is what the storm must not have cost.
        model = models(MODELS)[7]
        watched = keda.watch(ref(model))
        await watched.opened.get()
        await keda.stub.IsActive(ref(model))
        await scaler.do("hold", [model])
        await watched.true()
        with contextlib.suppress(asyncio.QueueEmpty):
            while True:
                watched.trues.get_nowait()
        # A stream that was kept costs some 20 KiB: of all of these it would be 60 MB, and its connection a descriptor.
        assert resident(pid) - before < 30 << 20
        assert len(descriptors(pid)) <= open_before + 3
