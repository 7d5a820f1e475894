"""The first replica of a model whose requests wait, where KEDA does not bring it.

KEDA follows a push within milliseconds. Where it does not (it is down, cut off from us or from the API, waits for up to a minute to open
its stream again, or has never heard of the object), requests would wait for as long as that lasts. So two seconds after a model's first
request the scale subresource of its target is read, and if it is still at zero it is set to what KEDA would set it to. It is read again,
less and less often, for as long as somebody waits: what stands in the way may be gone by then.
KEDA stays in charge. It finds the target scaled, as if by hand: our answers keep it up while it is in use, and its cooldown takes it back.
Without KEDA nobody takes it back, which is the lesser evil, and an alert (deploy/prometheus/rules.yaml).
- Whoever pauses a ScaledObject, or its scale-out, is obeyed.
- Several replicas of the scaler may do the same: the write counts for the version that was read, and the second finds it done.
Rejected: only where no stream of KEDA's is open (a stream can be open to a KEDA that cannot write, or be half dead for a minute); scaling
at once (it would be what KEDA writes at the same time, and a request of the API for every activation).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import Counter

from scaler.books.demand import DemandReader, UnknownModel
from scaler.kubernetes.events import Events
from scaler.kubernetes.first_demand import FirstDemand
from scaler.kubernetes.resources import SCALED_OBJECTS
from scaler.kubernetes.scale import Api as ScaleApi
from scaler.kubernetes.scale import raise_scale
from scaler.kubernetes.scaled_object import ScaledObject
from zerowake_shared.backoff import Backoff
from zerowake_shared.kubernetes.errors import ClusterError

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 2.0
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.5, 10.0

ACTIVATED = Counter("zerowake_scaled_without_keda_total", "Targets taken from zero by the scaler since KEDA did not, by model.", ["model"])


class Api(ScaleApi, Events, Protocol):
    """What is needed of a Cluster."""


class FirstReplica:
    """Hooks into the ledger; `close` ends what is under way. `objects`: the ScaledObjects of a model, as they are now."""

    def __init__(self, ledger: DemandReader, api: Api, objects: Callable[[str], Iterable[ScaledObject]]) -> None:
        self._ledger = ledger
        self._api = api
        self._objects = objects
        # Of an earlier request, too: its client may have left, and asks again before two seconds are over.
        self._first = FirstDemand(ledger, self._run, "first replica", anew=False)

    async def close(self) -> None:
        await self._first.close()

    async def _run(self, model: str) -> None:
        looks = Backoff(_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS)
        await asyncio.sleep(PATIENCE_SECONDS)
        while self._waited_for(model):
            for found in self._objects(model):
                await self._see_to(model, found)
            await asyncio.sleep(looks.next())

    def _waited_for(self, model: str) -> bool:
        try:
            demand = self._ledger.demand_anywhere(model)
        except UnknownModel:
            return False  # withdrawn
        return demand.pending > 0 and demand.replicas == 0

    async def _see_to(self, model: str, found: ScaledObject) -> None:
        if found.paused or found.max_replicas < 1 or found.metadata.deletion_timestamp:
            return
        try:
            done = await raise_scale(self._api, found, lambda current: current or found.first_replicas)
        except ClusterError as error:
            log.warning("requests for %s wait, KEDA does not scale ScaledObject %s/%s, nor can the scaler: %s", model, *found.key, error)
            return
        if done is None or done.before > 0:
            return  # it is on its way
        ACTIVATED.labels(model).inc()
        note = (
            f"requests for the model {model} waited for {PATIENCE_SECONDS:g} s and KEDA did not scale {found.target_name} from zero:"
            " the scaler did. See whether KEDA's operator runs and reaches the scaler"
        )
        log.warning("ScaledObject %s/%s: %s", *found.key, note)
        await self._api.event(SCALED_OBJECTS, found.metadata, "Warning", "ScaledWithoutKeda", note, "Scale")
