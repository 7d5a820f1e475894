"""Gateways that do not say what places they have: how long each has had to get down to its share, and what its share is.

One of which nothing is heard may live and send requests. It gets down to its share of each replica in the time that it is given, and so
does this side. Whoever has had that time is overdue.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Iterable

from scaler.fleet.member import Hearing, Member


class Silence:
    """Calls `again()` when the next one is overdue. take_seconds: the time that each has; `now`: the clock."""

    def __init__(self, take_seconds: float, now: Callable[[], float], again: Callable[[], None]) -> None:
        self._take = take_seconds
        self._now = now
        self._again = again
        self._since: dict[str, tuple[Hearing, float]] = {}  # by address: how it stands, and since when
        self._timer: asyncio.TimerHandle | None = None

    def look(self, members: Iterable[Member], unknown: Collection[str]) -> None:
        """Who is there now. unknown: addresses of those that are heard, and have not told this gateway what they have."""
        now = self._now()
        before, self._since = self._since, {}
        for each in members:
            if each.hearing is Hearing.SILENT or each.address in unknown:
                hearing, since = before.get(each.address, (each.hearing, now))
                self._since[each.address] = each.hearing, since if hearing is each.hearing else now
        due = min((since + self._take for _, since in self._since.values() if since + self._take > now), default=None)
        self.close()
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(due - now, self._again)

    @property
    def addresses(self) -> set[str]:
        """Of those that do not say what they have."""
        return set(self._since)

    def is_overdue(self, member: Member) -> bool:
        """It has had its time to get down to its share, and so has this side."""
        hearing, since = self._since.get(member.address, (None, 0.0))
        return hearing is member.hearing and self._now() >= since + self._take

    def close(self) -> None:
        """Calls nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def share(address: str, replica: str, places: int, addresses: Iterable[str]) -> int:
    """The part of a replica's places that is this gateway's while nothing is heard of others. Whoever works it out comes to the same, and
    all parts together are the places.

    addresses: of all gateways that share them, this one among them.
    """
    ranked = sorted(addresses, key=lambda each: hashlib.blake2b(f"{each} {replica}".encode()).digest())
    return places // len(ranked) + (ranked.index(address) < places % len(ranked))
