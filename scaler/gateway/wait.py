"""What a client is told of its request's wait: `X-Zerowake-Origin`, `X-Zerowake-Activation`, `Server-Timing`. Pure.

Server-Timing (W3C) is a list to which everybody on the way adds: the engine's own stays, in a field of its own before ours. Times are
milliseconds. `zerowake` is the whole wait, from the request's head to the first byte of its answer; the others are its parts, of which
`weights` is what those took longer than the image. A request that joins others which wait already is told of those parts alone that lay in
its own wait.
Rejected: the activation's phases as they are, which for all but its first request would add up to more than was waited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from scaler.books.activation import Activation
from scaler.gateway.answer_parser import Fields
from zerowake_shared.phases import Phase

ORIGIN = "X-Zerowake-Origin"
ACTIVATION = "X-Zerowake-Activation"
TIMING = "Server-Timing"
RUNNING = "running"  # the origin for a request that needed no new replica
UNKNOWN = "unknown"  # the origin of a replica of which no agent says how it was made

_ORIGIN, _ACTIVATION, _TIMING = ORIGIN.encode(), ACTIVATION.encode(), TIMING.encode()
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
NO_WAIT: Fields = [(_ORIGIN, RUNNING.encode())]


class Wait:
    """One request's, from the moment that it stands in line. arrived, joined, handed: moments of the activations' clock.

    activation: the one that it waits for; None: it waits for a place on a replica that is there.
    """

    __slots__ = ("_arrived", "_joined", "activation", "handed")

    def __init__(self, arrived: float, joined: float, activation: Activation | None) -> None:
        self._arrived = arrived
        self._joined = joined
        self.activation = activation
        self.handed: float | None = None  # when a replica got the request, last

    def parts(self, now: float) -> Mapping[str, float]:
        """Seconds by part, whose sum is the whole wait until `now`."""
        until = now if self.handed is None else self.handed
        parts: dict[str, float] = {Phase.HELD: self._joined - self._arrived}
        line = self._joined  # since then it waits for its turn alone
        if self.activation is not None:
            ready = self.activation.ready
            line = until if ready is None else max(self._joined, min(ready, until))
            found = self.activation.within(self._joined, line)
            parts |= {phase: seconds for phase, seconds in found.items() if phase not in {Phase.HELD, Phase.FIRST_BYTE}}
        if until > line:
            parts["queued"] = until - line
        if self.handed is not None:
            parts[Phase.FIRST_BYTE] = now - self.handed
        return parts

    def timing(self, now: float) -> str:
        """The value of Server-Timing."""
        parts = {"zerowake": now - self._arrived, **self.parts(now)}
        # A newer agent may have a phase whose name is none here.
        return ", ".join(f"{name};dur={1000 * seconds:.3f}" for name, seconds in parts.items() if _TOKEN.fullmatch(name))

    def told_first(self) -> Fields:
        """What is known while it waits."""
        return [] if self.activation is None else [(_ACTIVATION, self.activation.id.encode())]

    def told_last(self, now: float) -> Fields:
        """What is known as the answer begins."""
        origin = RUNNING if self.activation is None else self.activation.origin or UNKNOWN
        return [(_ORIGIN, origin.encode()), (_TIMING, self.timing(now).encode())]

    def told(self, now: float) -> Fields:
        return self.told_last(now) + self.told_first()

    def told_of_refusal(self, now: float) -> Mapping[str, str]:
        """For the head of an answer that says that there was no replica."""
        return {TIMING: self.timing(now), **({} if self.activation is None else {ACTIVATION: self.activation.id})}
