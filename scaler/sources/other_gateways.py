"""How many requests of a model the other replicas of the scaler have in flight while its engines are asked how many they have.

They tell their numbers a moment late, and what began and ended within that moment not at all. So it is reckoned with how often a request
began there at all: nothing can have been in flight but what was when the tally began, and what has begun until a little after the engines
were asked. That is never too few, and for a model that is asked often a few too many: then less counts as asked past the gateways.
Where one of them is not heard of, came or went meanwhile, or is too old to tell, it is not known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from scaler.fleet.member import Flights, Hearing, Member
from scaler.sources.source import SourceError

LATE_SECONDS = 0.25  # ten times what news are gathered for (fleet/subscriber.py), before they are told


class Heard(Protocol):
    """What is known of the other replicas (fleet/peers.py)."""

    def members(self) -> list[Member]: ...

    def flights(self, model: str) -> Mapping[str, Flights]: ...


class OtherGateways:
    """Begins tallies."""

    def __init__(self, heard: Heard, late_seconds: float = LATE_SECONDS) -> None:
        self._heard = heard
        self._late_seconds = late_seconds

    def tally(self, model: str) -> GatewaysTally:
        return GatewaysTally(self._heard, model, self._late_seconds)


class GatewaysTally:
    """From now on."""

    def __init__(self, heard: Heard, model: str, late_seconds: float) -> None:
        self._heard = heard
        self._model = model
        self._late_seconds = late_seconds
        self._before = heard.flights(model)

    async def most(self) -> int:
        """As in Tally."""
        await asyncio.sleep(self._late_seconds)  # what had begun by now is told by then
        after = self._heard.flights(self._model)
        if silent := [each.address for each in self._heard.members() if each.hearing in (Hearing.SILENT, Hearing.UNASKED)]:
            raise SourceError(f"what the gateway at {', '.join(silent)} has in flight is not known: it is not heard of")
        if after.keys() != self._before.keys():
            raise SourceError("another gateway came or went while the replicas were asked")
        most = 0
        for gateway, early in self._before.items():
            begun = after[gateway].begun
            if begun < early.begun or after[gateway].in_flight > begun:
                raise SourceError(
                    "another gateway does not tell how many requests began there: it is of another version, or knows the model anew"
                )
            most += early.in_flight + begun - early.begun
        return most
