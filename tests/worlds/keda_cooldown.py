"""KEDA's cooldown, as one object of its has it, in the loop's time: pushes, polls and the HPA's syncs, and a target that ends slowly.

As in KEDA 2.21: a `true` and a poll that finds the object active are activity, and bring the first replica. A poll that finds it inactive
takes the target to zero once its last activity is longer ago than the cooldown. A `true` is taken in a moment after it came, and a poll may
come between. The HPA's sync asks the same questions, and nobody remembers what it was told. What a target's last replica does between being
given up and being gone the gateway sees: it is there, and not ready.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from zerowake_proto import externalscaler_pb2 as pb

from scaler.books.hpa import SYNC_SECONDS
from scaler.books.ledger import Ledger
from tests.worlds.keda_client import ref
from zerowake_shared.clock import Clock


class CooledDown:
    """One model's target, which KEDA scales between nothing and one replica. Use `async with scaled.by(stub)`.

    `drain`: seconds for which a replica that was given up is still there. `sync_at`: the moment of the HPA's first sync. `lag`: seconds in
    which a `true` is taken in.
    """

    def __init__(
        self,
        ledger: Ledger,
        model: str,
        clock: Clock,
        *,
        cooldown: float,
        polling: float,
        sync_at: float,
        drain: float,
        lag: float = 0.0,
    ) -> None:
        self.activations: list[tuple[float, int]] = []  # when it left zero, and how many requests waited then
        self.gone: list[float] = []  # when it was given up
        self._ledger, self._model, self._now = ledger, model, clock.now
        self._cooldown, self._polling, self._sync_at, self._drain = cooldown, polling, sync_at, drain
        self._lag = lag
        self._ref = ref(model)
        self._replicas = 0
        self._last_active = -math.inf
        self._ended: asyncio.TimerHandle | None = None
        self._ready = asyncio.Event()

    @asynccontextmanager
    async def by(self, stub: object) -> AsyncIterator[None]:
        """KEDA asks this stub until the block ends."""
        tasks = [asyncio.create_task(work(stub)) for work in (self._listen, self._poll, self._sync)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

    async def request(self, seconds: float) -> None:
        """One that waits for a replica if there is none."""
        self._ledger.hold(self._model, 1)
        await self._ready.wait()
        self._ledger.hand_over(self._model, 1)
        await asyncio.sleep(seconds)
        self._ledger.end(self._model)

    async def _listen(self, stub: object) -> None:
        async for response in stub.StreamIsActive(self._ref):  # type: ignore[attr-defined]
            if response.result:
                asyncio.get_running_loop().call_later(self._lag, functools.partial(self._decide, active=True))

    async def _poll(self, stub: object) -> None:
        while True:
            self._decide(active=await self._ask(stub))
            await asyncio.sleep(self._polling)

    async def _sync(self, stub: object) -> None:
        await asyncio.sleep(self._sync_at)
        while True:
            if self._replicas:
                await self._ask(stub)
            await asyncio.sleep(SYNC_SECONDS)

    async def _ask(self, stub: object) -> bool:
        spec = await stub.GetMetricSpec(self._ref)  # type: ignore[attr-defined]
        request = pb.GetMetricsRequest(scaledObjectRef=self._ref, metricName=spec.metricSpecs[0].metricName)
        await stub.GetMetrics(request)  # type: ignore[attr-defined]
        return bool((await stub.IsActive(self._ref)).result)  # type: ignore[attr-defined]

    def _decide(self, *, active: bool) -> None:
        if active:
            self._last_active = self._now()
            if self._replicas == 0:
                self._begin()
        elif self._replicas and self._now() > self._last_active + self._cooldown:
            self._give_up()

    def _begin(self) -> None:
        self.activations.append((self._now(), self._ledger.demand(self._model).pending))
        self._replicas = 1
        if self._ended:
            self._ended.cancel()
        self._ledger.set_replicas(self._model, ready=1, replicas=1)
        self._ready.set()

    def _give_up(self) -> None:
        self.gone.append(self._now())
        self._replicas = 0
        self._ready.clear()
        self._ledger.set_replicas(self._model, ready=0, replicas=1)
        self._ended = asyncio.get_running_loop().call_later(self._drain, self._ledger.set_replicas, self._model, 0, 0)
