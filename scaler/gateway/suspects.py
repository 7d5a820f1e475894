"""Replicas that failed, and those that may have: they are tried until they accept a connection.

A replica that failed a request before its first byte is *suspect*: it gets no requests until it accepts a connection again, tried at once
(an engine that closed an idle connection under us is back in a millisecond) and then ever less often, until somebody says that it is gone.
One that was tried in vain does not count as ready, so that its model's next request is a first one: another replica is asked for.
Where nothing answered at all, not even with a refusal, it is the node that is suspect, and every replica there with it: each of them would
cost another request its time. A node whose agent is silent is looked at, too, but its replicas serve until they are found to be cut off:
agents come and go, and engines stay.
Rejected: excluding a replica for the one retried request only, because then every other held request would burn its own retry on it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine, Iterable

from scaler.gateway.member import Member
from scaler.gateway.upstream import NotReached
from zerowake_shared.backoff import Backoff

log = logging.getLogger(__name__)

_FIRST_SECONDS, _LAST_SECONDS = 0.05, 2.0
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class Suspects:
    """members: all that there are now. changed: told of each whose standing has changed. run: makes a task that somebody owns."""

    def __init__(
        self,
        members: Callable[[], Iterable[Member]],
        changed: Callable[[Member], None],
        run: Callable[[Coroutine[object, object, None]], asyncio.Task[None]],
    ) -> None:
        self._members = members
        self._changed = changed
        self._run = run
        self._checked: set[str] = set()  # replicas that are being looked at
        self._listeners: list[Callable[[str], None]] = []

    def on_unreachable(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(node)` when nothing answers at a replica of the node."""
        self._listeners.append(callback)

    def failed(self, member: Member, error: BaseException) -> None:
        """The replica failed a request before its first byte. Its place is still taken."""
        if member.gone or member.probe is not None:
            return
        log.warning(
            "a replica failed a request before its first byte; it gets no more until it accepts a connection",
            extra={"fields": {"model": member.pool.model, "replica": member.backend.id, "error": f"{type(error).__name__}: {error}"}},
        )
        self._suspect(member)
        if _is_silence(error):
            self._cut_off(member, error)

    def doubt(self, node: str) -> None:
        """Nothing is heard of the node."""
        for member in self._on(node):
            if member.probe is None and member.backend.id not in self._checked:
                self._checked.add(member.backend.id)
                self._run(self._check(member))

    def forget(self, member: Member) -> None:
        """It is tried no more."""
        if member.probe is not None:
            member.probe.cancel()
            member.probe = None
        member.unready = member.unreachable = False

    def _on(self, node: str) -> list[Member]:
        return [each for each in self._members() if node and each.backend.node == node]

    def _suspect(self, member: Member) -> None:
        if member.probe is None and not member.gone:
            member.probe = self._run(self._probe(member))

    def _cut_off(self, member: Member, error: BaseException) -> None:
        """Nothing answers: neither there nor, it seems, anywhere on its node."""
        fields = {"replica": member.backend.id, "node": member.backend.node, "error": f"{type(error).__name__}: {error}"}
        log.warning(
            "nothing answers at a replica; those of its node get no requests until they accept a connection", extra={"fields": fields}
        )
        member.unready = member.unreachable = True
        self._changed(member)
        for sibling in self._on(member.backend.node):
            self._suspect(sibling)
        for callback in self._listeners:
            callback(member.backend.node)

    async def _check(self, member: Member) -> None:
        """It serves meanwhile."""
        try:
            await member.upstream.probe()
        except OSError as error:
            if not member.gone and member.probe is None and not isinstance(error, ConnectionAbortedError):
                self._suspect(member)
                if _is_silence(error):
                    self._cut_off(member, error)
        finally:
            self._checked.discard(member.backend.id)

    async def _probe(self, member: Member) -> None:
        backoff = Backoff(_FIRST_SECONDS, _LAST_SECONDS)
        while True:
            try:
                await member.upstream.probe()
                break
            except OSError as error:
                if not member.unready or member.unreachable is not _is_silence(error):
                    member.unready, member.unreachable = True, _is_silence(error)
                    self._changed(member)
                await asyncio.sleep(backoff.next())
        member.probe = None
        member.unready = member.unreachable = False
        self._changed(member)


def _is_silence(error: BaseException) -> bool:
    """Whether nothing answered. A refusal, or a connection that was reset, is an answer of the node's."""
    why = error.__cause__ if isinstance(error, NotReached) else error
    return isinstance(why, TimeoutError) or (isinstance(why, OSError) and why.errno in _UNREACHABLE)
