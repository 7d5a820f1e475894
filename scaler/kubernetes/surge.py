"""From nothing to as many replicas as wait for, at once: the part of a scale-up that the HPA would bring at its next sync.

KEDA's push scales 0 → 1 and no further; the rest is the HPA's, which looks every 15 s. In those 15 s after a model's first request, and
only then, the number that the HPA would ask for is set here, by the scale subresource of the ScaledObject's target: what KEDA and the HPA
themselves write. Both stay in charge:
- KEDA activates, or first_replica.py where it does not. Nothing is done before the target has left zero, and it has to be in this order:
  KEDA sees zero in its cache and then writes 1, so what was raised before is lowered by it.
- The HPA's own arithmetic is used (books/hpa.py), within maxReplicaCount, on the metric that it reads. It finds what it would have set,
  keeps it or lowers it by its own rules, and nothing has to be put back: what was raised here is not marked as ours in any way.
- Whoever says how fast a workload may grow (behavior.scaleUp), pauses it, or scales it by a formula, is left to the HPA alone.
It only raises, and never over what is there: the patch counts for the version that was read. Two replicas of the scaler that both hold
requests do the same, and the second finds it done.
Rejected: raising minReplicaCount before the push (KEDA would then go to it in one step, but it is the user's own field, watched by GitOps
tools; it has to be put back, by somebody who may have died, and until then it is paid for; and each change of the spec makes KEDA close
the push stream and open it anew), one metric per missing replica, a shorter sync for all HPAs of the cluster (a flag of the control plane).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress

from prometheus_client import Counter

from scaler.books.demand import DemandReader, UnknownModel
from scaler.books.hpa import SYNC_SECONDS
from scaler.kubernetes.first_demand import FirstDemand
from scaler.kubernetes.scale import Api, raise_scale
from scaler.kubernetes.scaled_object import ScaledObject
from scaler.plan.actions import Start
from scaler.plan.policy import decide
from scaler.plan.world import Model, ScaleTarget, World
from zerowake_shared.backoff import Backoff
from zerowake_shared.kubernetes.errors import ClusterError

log = logging.getLogger(__name__)

_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.01, 1.0
_GATHER_SECONDS = 0.02  # the requests of one burst do not come in one instant

RAISED = Counter("zerowake_surge_replicas_total", "Replicas that were asked for ahead of the HPA, by model.", ["model"])


class Surge:
    """Hooks into the ledger; `close` ends what is under way. `objects`: the ScaledObjects of a model, as they are now."""

    def __init__(self, ledger: DemandReader, api: Api, objects: Callable[[str], Iterable[ScaledObject]]) -> None:
        self._ledger = ledger
        self._api = api
        self._objects = objects
        self._first = FirstDemand(ledger, self._run, "surge", anew=True)  # each activation has its whole time

    async def close(self) -> None:
        await self._first.close()

    async def _run(self, model: str) -> None:
        """Until the HPA has looked once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SYNC_SECONDS), asyncio.TaskGroup() as group:
                for found in self._objects(model):
                    if why := found.reserved:
                        log.info("ScaledObject %s/%s is left to the HPA: %s", *found.key, why)
                    else:
                        group.create_task(self._follow(model, found), name=f"surge of {'/'.join(found.key)}")

    async def _follow(self, model: str, found: ScaledObject) -> None:
        looks = Backoff(_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS)
        try:
            while True:
                await self._outgrown(model, found, 1)  # KEDA sees to the first
                pause = looks.next()
                if there := await self._raise(model, found):
                    # What is there is trusted for a while only: a write of KEDA's that was on its way may still lower it.
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._outgrown(model, found, there)
                else:
                    await asyncio.sleep(pause)
        except UnknownModel:
            return  # withdrawn

    async def _outgrown(self, model: str, found: ScaledObject, replicas: int) -> None:
        """Returns when the backlog is worth more than so many."""
        with self._ledger.subscribe(model) as subscription:
            while self._wanted(model, found, replicas) <= replicas:
                await subscription.changed()
                await asyncio.sleep(_GATHER_SECONDS)

    def _wanted(self, model: str, found: ScaledObject, current: int) -> int:
        """The replicas that the plan asks for; `current` where it asks for none more. Raises: UnknownModel."""
        trigger = found.trigger
        if trigger is None:
            return current
        world = World(
            now=0.0,
            models={model: Model(model)},
            demand={model: self._ledger.demand_anywhere(model)},
            targets={model: ScaleTarget(current, trigger.target_pending, found.max_replicas)},
        )
        return max((action.replicas for action in decide(world).actions if isinstance(action, Start)), default=current)

    async def _raise(self, model: str, found: ScaledObject) -> int:
        """What the target is set to, then; 0: KEDA has not activated it, or it could not be asked."""
        try:
            done = await raise_scale(self._api, found, lambda current: self._wanted(model, found, current))
        except ClusterError as error:
            log.warning("ScaledObject %s/%s cannot be scaled ahead of the HPA: %s", *found.key, error)
            return 0
        if done is None:
            return 0
        if done.after > done.before:
            RAISED.labels(model).inc(done.after - done.before)
            said = (*found.key, found.target_name, done.before, done.after)
            log.info("ScaledObject %s/%s: %s scaled from %d to %d ahead of the HPA", *said)
        return done.after
