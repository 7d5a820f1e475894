"""Whether a model has been in use since whoever scales it last heard of it.

Requests may begin and end between two looks of KEDA's, and what it does not see does not count: it takes a model away that is asked every
two seconds. So what a look is answered is not only what is pending now, but whether there was anything since.

Since when? A push tells KEDA when the model was in use, to the moment; what came before it is known. Where nothing is pushed, the looks
have to do, and they are not alike: KEDA's poll counts, while the HPA's sync asks the very same questions and forgets the answer to the one
that matters here. Nothing in a call says whose it is. An HPA looks twice in the thirty seconds between two polls, so what was there since
the third last look is told again.
Rejected: a fixed time for which a model counts as in use (it would lengthen every cooldown shorter than itself); the first look that sees
it takes it away (that may be the HPA's).
"""

from __future__ import annotations

from collections import deque

from scaler.books.demand import DemandReader, UnknownModel

_LOOKS = 3
_LOOKERS = 10_000  # remembered at most; the one that has not looked for longest is forgotten first


class Activity:
    """What was told of every model's use, and what was not yet."""

    def __init__(self, demand: DemandReader) -> None:
        self._demand = demand
        self._told: dict[str, int] = {}  # model → its turns when KEDA was last pushed to
        self._looks: dict[tuple[str, ...], deque[int]] = {}  # who looks, at what → the model's turns at the last looks

    def tell(self, model: str) -> None:
        """KEDA has just been told, here or by another gateway, that the model is in use."""
        self._told[model] = self._demand.turns(model)

    def untold(self, model: str) -> bool:
        """Whether a request has begun or ended since KEDA was last pushed to, and there is a replica to keep for the next one."""
        try:
            replicas = self._demand.demand_anywhere(model).replicas
        except UnknownModel:
            return False
        return replicas > 0 and self._demand.turns(model) != self._told.get(model, 0)

    def look(self, model: str, *looker: str) -> bool:
        """Whether the model is in use, or was since this one looked before and was not told since. Raises: UnknownModel."""
        pending = self._demand.demand_anywhere(model).pending > 0
        turns = self._demand.turns(model)
        key = (model, *looker)
        looks = self._looks.pop(key, None) or deque([0], maxlen=_LOOKS)
        recent = turns != looks[0]
        looks.append(turns)
        self._looks[key] = looks
        if len(self._looks) > _LOOKERS:
            del self._looks[next(iter(self._looks))]
        return pending or (recent and self.untold(model))
