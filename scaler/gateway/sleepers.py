"""Replicas that sleep in their pods, and are woken for the requests that wait: which one next, and how many.

A replica that sleeps is there and has no places. Where nobody is awake, the first request that waits has one woken at once; where somebody
is, it waits a moment first, since a place of one that is awake may be about to come free, or be granted. One more is woken for each
`concurrency` of requests that wait. One that could not be woken is *shunned*: the others come first, and it has its turn again when whoever
wakes them says so. Nobody is told twice of one that is being woken.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import Gauge

if TYPE_CHECKING:
    from scaler.gateway.member import Backend, Member
    from scaler.gateway.pool import Pool

PATIENCE_SECONDS = 0.05
_SLEEPING = Gauge("zerowake_sleeping_replicas", "Replicas that sleep in their pods, until a request wakes them.", ["model"])


class Slumber(enum.Enum):
    """Whether a replica must be woken before it can be sent requests."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    WAKING = "waking"
    SHUNNED = "shunned"


class Sleepers:
    """line: how many requests of a pool wait now, and on how many each replica works."""

    def __init__(self, line: Callable[[Pool], tuple[int, int]]) -> None:
        self._line = line
        self._wake: Callable[[Backend], None] = lambda _: None
        self._patient: dict[str, asyncio.TimerHandle] = {}  # by model: looks again when the moment is over

    def woken_by(self, wake: Callable[[Backend], None]) -> None:
        """Calls `wake(backend)` for each replica that is wanted awake."""
        self._wake = wake

    def is_awake(self, member: Member, awake: bool) -> None:
        """What its agent says. One that is being woken, and is said to sleep still, is not asked for twice."""
        if awake:
            member.slumber = Slumber.AWAKE
        elif not member.asleep:
            member.slumber = Slumber.ASLEEP

    def count(self, pool: Pool) -> None:
        """Who is in the pool, or asleep, has changed."""
        sleeping = sum(member.asleep for member in pool.members.values())
        if sleeping or pool.has_slept:
            pool.has_slept = True
            _SLEEPING.labels(pool.model).set(sleeping)

    def wanted(self, pool: Pool, requests: int) -> None:
        """So many requests have no place now."""
        if not requests or not any(member.asleep for member in pool.members.values()):
            return
        if not any(member.takes_requests for member in pool.members.values()):
            self._want(pool, requests)
        elif pool.model not in self._patient:
            self._patient[pool.model] = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._look_again, pool)

    def failed(self, member: Member) -> None:
        """It could not be woken: another one is, if there is one."""
        if member.slumber is Slumber.WAKING:
            member.slumber = Slumber.SHUNNED
            self._look_again(member.pool)

    def forgiven(self, member: Member) -> None:
        """One that could not be woken has its turn again."""
        if member.slumber is Slumber.SHUNNED:
            member.slumber = Slumber.ASLEEP
            self._look_again(member.pool)

    def close(self) -> None:
        for timer in self._patient.values():
            timer.cancel()

    def _look_again(self, pool: Pool) -> None:
        if timer := self._patient.pop(pool.model, None):
            timer.cancel()
        self._want(pool, self._line(pool)[0])

    def _want(self, pool: Pool, requests: int) -> None:
        places = self._line(pool)[1]
        there = [member for member in pool.members.values() if not (member.rests or member.ending)]
        waking = sum(member.slumber is Slumber.WAKING for member in there)
        for member in [each for each in there if each.slumber is Slumber.ASLEEP]:
            if requests <= waking * places:
                return
            waking += 1
            member.slumber = Slumber.WAKING
            self._wake(member.backend)
