"""Whether a model has been in use since whoever scales it last heard of it.

Requests may begin and end between two looks of KEDA's, and what it does not see does not count: it takes a model away that is asked every
two seconds. So what a look is answered is not only what is pending now, but whether there was anything since.

Since when? A push tells KEDA when the model was in use, to the moment; what came before it is known. Where nothing is pushed, the looks
have to do, and they are not alike: KEDA's poll counts, while the HPA's sync asks the very same questions and forgets the answer to the one
that matters here. Nothing in a call says whose it is. An HPA looks twice in the thirty seconds between two polls, so what was there since
the third last look is told again.

Pushes keep a distance, so what came after the last one may have its push still to come. Until then every look is answered that the model is
in use, as the push will say: KEDA would take the model away at a look that said otherwise, and bring it back at the push. So it is for a
moment after each push, since KEDA may look while it takes that in. Cooldowns are no longer by it, as they begin anew at that push, or by no
more than that moment. Any gateway may be asked, and all hear of every push, so both are counted from the last one.

A replica that still loads counts as use. Whoever it was made for may have left: an engine that starts cold takes longer than clients wait,
and than a cooldown. Taken away then, it would be begun again by the next request, and would never serve anybody.
Rejected: a fixed time for which a model counts as in use after each request (it would lengthen every cooldown shorter than itself); the
first look that sees it takes it away (that may be the HPA's).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from scaler.books.demand import DemandReader, UnknownModel
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

REPEAT_SECONDS = 3.0  # from one push of a model's use to the next, at least
_LATE_SECONDS = 0.5  # a push, another gateway's word of one, and what KEDA makes of it, on a busy machine
_NEVER = 0, -math.inf
_LOOKS = 3
_LOOKERS = 10_000  # remembered at most; the one that has not looked for longest is forgotten first


class Activity:
    """What was told of every model's use, and what was not yet. `repeat_seconds`: from one push of it to the next."""

    def __init__(self, demand: DemandReader, clock: Clock = SYSTEM_CLOCK, repeat_seconds: float = REPEAT_SECONDS) -> None:
        self._demand = demand
        self._now = clock.now
        self._due_within = repeat_seconds + _LATE_SECONDS
        self._told: dict[str, tuple[int, float]] = {}  # model → its turns when KEDA was last pushed to, and the moment of that
        self._looks: dict[tuple[str, ...], deque[int]] = {}  # who looks, at what → the model's turns at the last looks
        self._loads: Callable[[str], bool] = lambda model: False

    def counts_loading(self, loads: Callable[[str], bool]) -> None:
        """`loads`: whether a replica of the model was begun, and is on its way to serve."""
        self._loads = loads

    def tell(self, model: str) -> None:
        """KEDA has just been told, here or by another gateway, that the model is in use."""
        self._told[model] = self._demand.turns(model), self._now()

    def untold(self, model: str) -> bool:
        """Whether a request has begun or ended since KEDA was last pushed to, and there is a replica to keep for the next one."""
        try:
            replicas = self._demand.demand_anywhere(model).replicas
        except UnknownModel:
            return False
        return replicas > 0 and self._demand.turns(model) != self._told.get(model, _NEVER)[0]

    def look(self, model: str, *looker: str) -> bool:
        """Whether the model is in use, or was since this one looked before and was not told since, or a push says so, or it loads.

        Raises: UnknownModel.
        """
        pending = self._demand.demand_anywhere(model).pending > 0
        turns = self._demand.turns(model)
        key = (model, *looker)
        looks = self._looks.pop(key, None) or deque([0], maxlen=_LOOKS)
        recent = turns != looks[0]
        looks.append(turns)
        self._looks[key] = looks
        if len(self._looks) > _LOOKERS:
            del self._looks[next(iter(self._looks))]
        since = self._now() - self._told.get(model, _NEVER)[1]
        if pending or (since < _LATE_SECONDS and self._demand.demand_anywhere(model).replicas > 0):
            return True
        return ((recent or since < self._due_within) and self.untold(model)) or self._loads(model)
