"""How the sources of a node do: how fast each gives, and which of them gave nothing when it was asked last.

A source's rate is what comes from all streams of it together, while one is open at least. Who reads verifies and keeps what comes before he
asks for more, so it is what this node gets from the source, and may be less than others do.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from restore_agent.transfer.bandwidth import Bandwidth
from restore_agent.transfer.source import Altered, Denied, Piece, Source, Unreachable
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_KEPT = 32  # sources: those that were read from last
_WINDOW = 1.0  # seconds that are measured at once
_ENOUGH = 1 << 20  # bytes that are measured though they came sooner: of less, the way there and back is the most
_WORDS = 300  # characters of a fault


@dataclass
class SourceState:
    """One source. fault: why it gave nothing when it was asked last; empty: it gave."""

    name: str
    fault: str = ""
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    _readers: int = 0
    _since: float = 0.0
    _bytes: int = 0

    @contextlib.contextmanager
    def read_at(self, clock: Clock) -> Iterator[None]:
        """While it is read from, by one stream."""
        if not self._readers:
            self._since, self._bytes = clock.now(), 0
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._measure(clock.now())

    def came(self, size: int, now: float) -> None:
        """So many bytes."""
        self.fault = ""
        self._bytes += size
        if now - self._since >= _WINDOW:
            self._measure(now)

    @property
    def is_read(self) -> bool:
        return self._readers > 0

    def _measure(self, now: float) -> None:
        if self._bytes >= _ENOUGH or now - self._since >= _WINDOW:
            self.bandwidth.measured(self._bytes, now - self._since)
        self._since, self._bytes = now, 0


class SourceStates:
    """Of one node, by the names of its sources."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._states: OrderedDict[str, SourceState] = OrderedDict()  # the one that was used longest ago first
        self.bytes: Counter[str] = Counter(store=0, agent=0)  # that have come, by the kind of source

    def __iter__(self) -> Iterator[SourceState]:
        return iter(list(self._states.values()))

    def measured(self, source: Source, kind: str) -> Source:
        """The same source, a "store" or another "agent". Whatever is read from it by this is counted."""
        return _Measured(source, kind, self, self._clock)

    def failed(self, source: Source, error: Exception) -> None:
        """`error`: what reading from it has raised. That it does not have something is no fault."""
        if isinstance(error, Altered | Denied | Unreachable):
            self.of(source).fault = str(error)[:_WORDS]

    def of(self, source: Source) -> SourceState:
        """To be used now."""
        name = str(source)
        state = self._states.setdefault(name, SourceState(name))
        self._states.move_to_end(name)
        idle = (each for each, other in self._states.items() if not other.is_read and other is not state)
        if len(self._states) > _KEPT and (oldest := next(idle, None)):
            del self._states[oldest]
        return state


class _Measured:
    """A Source over another one."""

    def __init__(self, inner: Source, kind: str, states: SourceStates, clock: Clock) -> None:
        self._inner = inner
        self._kind = kind
        self._states = states
        self._clock = clock

    def __str__(self) -> str:
        return str(self._inner)

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        state = self._states.of(self._inner)
        with state.read_at(self._clock):
            async with contextlib.aclosing(self._inner.read(key, offset, length)) as pieces:
                async for piece in pieces:
                    state.came(len(piece), self._clock.now())
                    self._states.bytes[self._kind] += len(piece)
                    yield piece

    async def size(self, key: str) -> int:
        return await self._inner.size(key)
