"""One activation at a time, for `zerowake trace`: by its id, the beginning of one, or `last`."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from scaler.books import activation as books
from scaler.books.activation import Activations
from scaler.view.state import LAST, Activation, Phase, as_json
from zerowake_shared.phases import Phase as PhaseName

_ALL = 1000  # more than are kept


def shown(activation: books.Activation) -> Activation:
    """As it is shown, with its phases where they were."""
    phases = activation.phases
    return Activation(
        id=activation.id,
        model=activation.model,
        outcome=activation.outcome,
        reason=activation.reason or None,
        origin=activation.origin or None,
        began=activation.began,
        seconds=activation.seconds,
        phases=tuple(Phase(str(name), at.begin, at.seconds) for name, at in activation.intervals.items()),
        unaccounted_seconds=phases.get(PhaseName.UNACCOUNTED),
        trace=activation.trace.trace_id if activation.trace else None,
    )


class Waterfalls:
    """Of the activations that are open, or were of late."""

    def __init__(self, activations: Activations) -> None:
        self._activations = activations

    @property
    def routes(self) -> list[web.RouteDef]:
        return [web.get("/trace/{id}", self._show)]

    def found(self, name: str) -> Sequence[books.Activation]:
        """Those whose ids begin so, the latest first; of `last` one at most."""
        known = [*self._activations.open(), *self._activations.recent(_ALL)]
        if name == LAST:
            return sorted(known, key=lambda each: each.began, reverse=True)[:1]
        return [each for each in known if each.id.startswith(name)]

    async def _show(self, request: web.Request) -> web.Response:
        found = self.found(request.match_info["id"])
        if len(found) == 1:
            return web.json_response(as_json(shown(found[0])))
        return web.json_response({"known": [each.id for each in found or self.found("")]}, status=404)
