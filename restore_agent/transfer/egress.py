"""What a node gives away to other nodes: so many bytes a second in all, to so many readers at once.

Serving others must not cost the engines of this node their network. The rate is one bucket for all readers: whoever wants to send takes its
bytes out of it first, and waits where they are not there yet. In it is at most what flows in a tenth of a second, so an idle node does not
save up a burst.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_BURST_SECONDS = 0.1


class Egress:
    """The node's bound. Its calls block, and any number of threads may make them."""

    def __init__(self, rate: float, streams: int, clock: Clock = SYSTEM_CLOCK) -> None:
        """`rate`: bytes a second. `streams`: readers that are sent something at the same time."""
        self.rate = rate
        self.streams = streams
        self._clock = clock
        self._changed = threading.Condition()
        self._closed = False
        self._free_at = clock.now()  # when all that was taken so far has flowed
        self._busy = 0
        self.sent = 0  # bytes

    @contextlib.contextmanager
    def stream(self, seconds: float) -> Iterator[bool]:
        """One of the readers until the block ends; it may be waited for so long. False: there are as many as may be."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy < self.streams or self._closed, seconds)
            has_room = self._busy < self.streams and not self._closed
            self._busy += has_room
        try:
            yield has_room
        finally:
            with self._changed:
                self._busy -= has_room
                self._changed.notify_all()

    def take(self, size: int) -> bool:
        """Returns when `size` bytes may be sent; False: nothing may be sent any more."""
        with self._changed:
            now = self._clock.now()
            begins = max(self._free_at, now - _BURST_SECONDS)
            self._free_at = begins + size / self.rate
            while not self._closed and (left := begins - self._clock.now()) > 0:
                self._changed.wait(left)
            if not self._closed:
                self.sent += size
            return not self._closed

    def close(self) -> None:
        """Whoever waits gives up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
