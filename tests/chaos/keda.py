"""A KEDA that behaves, beside those of misuse.py: asks each machine for each model's metric all the time, and writes down what it was told.

    python -m tests.chaos.keda JOURNAL SEED NAME=PORT…

Its input has the words of the clients (clients.py). A replica is to have one request, so that what it is told is how many there are, and
one for each replica that nobody reaches.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from zerowake_proto import externalscaler_pb2 as pb
from zerowake_proto import externalscaler_pb2_grpc

from tests.chaos.clients import MODELS
from tests.chaos.journal import append
from tests.chaos.words import heard

if TYPE_CHECKING:
    from zerowake_proto.externalscaler_pb2_grpc import ExternalScalerAsyncStub

_PATIENCE = 10.0  # seconds


class Keda:
    """That of one run."""

    def __init__(self, journal: Path, seed: str, ports: dict[str, int]) -> None:
        self._journal, self._ports = journal, ports
        self._chance = random.Random(f"keda {seed}")
        self._go = asyncio.Event()

    async def run(self) -> None:
        """Until its input ends."""
        async with contextlib.AsyncExitStack() as stack:
            asking = []
            for machine, port in self._ports.items():
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
                stub = externalscaler_pb2_grpc.ExternalScalerStub(channel)
                asking += [asyncio.create_task(self._ask(stub, machine, model)) for model in MODELS]
            async for word in heard():
                if word == "go":
                    self._go.set()
                else:
                    self._go.clear()
                    print("paused", flush=True)
            for task in asking:
                task.cancel()

    async def _ask(self, stub: ExternalScalerAsyncStub, machine: str, model: str) -> None:
        wanted = pb.ScaledObjectRef(name=f"{model}-asked", namespace="default", scalerMetadata={"model": model, "targetPending": "1"})
        while True:
            await self._go.wait()
            with contextlib.suppress(grpc.aio.AioRpcError):  # it is killed now and then, and has too little of something
                name = (await stub.GetMetricSpec(wanted, timeout=_PATIENCE)).metricSpecs[0].metricName
                asked = time.time()
                answer = await stub.GetMetrics(pb.GetMetricsRequest(scaledObjectRef=wanted, metricName=name), timeout=_PATIENCE)
                value = answer.metricValues[0].metricValueFloat
                append(self._journal, what="told", machine=machine, model=model, asked=asked, value=value)
            await asyncio.sleep(self._chance.uniform(0.05, 0.4))


if __name__ == "__main__":
    asyncio.run(Keda(Path(sys.argv[1]), sys.argv[2], {name: int(port) for name, port in (each.split("=") for each in sys.argv[3:])}).run())
