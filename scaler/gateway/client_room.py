"""How many clients may be connected, and who makes room for a new one.

Every connection costs a descriptor, and a process has only so many. Without any left nothing goes on: no connection to a replica can be
made, so that held requests wait in vain, and no probe is answered. So clients have three quarters of them at most, and the rest is for
replicas, probes, KEDA and agents. A client beyond that is let in where another has no request under way (it rests between two requests, or
has sent a part of a head): of these the one that has been so for longest is closed, as a server may do at any time. Where all have
requests under way, the new one is told that it comes at a bad time, and when to come again; beyond another eighth nobody is told.
Rejected: to stop accepting (clients then wait in the kernel's queue, and nobody is told why); a limit by address (proxies are one).
"""

from __future__ import annotations

import logging
import resource
from typing import Protocol

from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_SAY_AGAIN_SECONDS = 60.0


class Client(Protocol):
    """A client's connection."""

    def make_room(self) -> None:
        """Ends it: there is no request under way."""


class ClientRoom:
    """The clients of one gateway. limit: how many at once."""

    def __init__(self, limit: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self.limit = limit
        self._now = clock.now
        self._clients: set[Client] = set()
        self._resting: dict[Client, None] = {}  # without a request, those first that have been so for longest
        self._said: float | None = None

    @classmethod
    def of_process(cls) -> ClientRoom:
        """As many as the process may have: its limit on open files is raised to what the system allows."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return cls(max(1, hard * 3 // 4))

    @property
    def is_over(self) -> bool:
        """Whether there are so many that there are no descriptors to tell them so."""
        return len(self._clients) > self.limit * 7 // 6

    def __len__(self) -> int:
        return len(self._clients)

    def enter(self, client: Client) -> bool:
        """A client has connected. False: all have requests under way, and it is one too many."""
        full = len(self._clients) >= self.limit
        self._clients.add(client)
        if not full:
            self._resting[client] = None
            return True
        self._say()
        for oldest in self._resting:
            self.leave(oldest)
            oldest.make_room()
            self._resting[client] = None
            return True
        return False

    def asks(self, client: Client) -> None:
        """Its request is here."""
        self._resting.pop(client, None)

    def rests(self, client: Client) -> None:
        """All that it has asked is answered."""
        if client in self._clients:
            self._resting[client] = None

    def leave(self, client: Client) -> None:
        """Its connection has ended."""
        self._clients.discard(client)
        self._resting.pop(client, None)

    def _say(self) -> None:
        now = self._now()
        if self._said is None or now >= self._said + _SAY_AGAIN_SECONDS:
            self._said = now
            log.warning(
                "%d clients are connected, as many as the limit on open files leaves to them: those without a request are closed, and "
                "where all have one, new ones are refused with 503; raise the limit (ulimit -n, LimitNOFILE of a unit, or the container's)",
                self.limit,
            )
