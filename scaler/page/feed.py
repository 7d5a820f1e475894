"""One stream of what changes, for all who listen: the state is read and compared once, whoever many look at it.

Nothing is read while nobody listens. Whoever begins is sent the whole state, and from then on what has changed. There is no queue for a
listener: the last few changes are kept once, for all. One that is too slow for them is sent the whole state again when it is ready for
more, so its memory is bounded, and it never holds up another; that one which takes nothing at all is cut by the site (site.py).

The state is read on the loop, which everything in it belongs to; comparing and encoding happen in a thread, on frozen values. How often:
every half second, and more seldom where that would take more than an eighth of the time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from scaler.page.changes import changes
from scaler.view.state import State, encoded
from zerowake_shared import background
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 0.5
_SHARE = 8  # of the time, one part at most is for reading and comparing
_KEPT = 8
_HEARTBEAT_SECONDS = 15.0
LISTENERS = 32


class TooManyListeners(Exception):
    """As many listen already as may."""


class Feed:
    """read: the state now."""

    def __init__(self, read: Callable[[], Awaitable[State]], clock: Clock = SYSTEM_CLOCK, interval: float = _INTERVAL_SECONDS) -> None:
        self._read = read
        self._clock = clock
        self._interval = interval
        self._listeners = 0
        self._wanted = asyncio.Event()
        self._news = asyncio.Event()  # another one for each version
        self._closed = False
        self._reading = asyncio.Lock()
        self._state: State | None = None
        self._version = 0  # of the state; the frames kept lead up to it
        self._frames: deque[bytes] = deque(maxlen=_KEPT)
        self._whole: asyncio.Task[bytes] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listeners hear something while the block runs; when it ends, so do their streams."""
        try:
            async with background.kept_beside(self._run, "the page's feed", log):
                yield
        finally:
            self._closed = True
            self._tell()

    async def listen(self) -> AsyncGenerator[bytes]:
        """Frames of server-sent events: `state` with the whole, `change` with what is another (changes.py), a comment now and then.

        Ends when the feed does. Raises: TooManyListeners.
        """
        if self._listeners >= LISTENERS:
            raise TooManyListeners(f"{LISTENERS} pages are open already")
        self._listeners += 1
        try:
            async with self._reading:
                if self._state is None:
                    self._state, self._version = await self._read(), 1
            self._wanted.set()
            version = 0
            while not self._closed:
                if version == self._version:
                    yield await self._awaited()
                    continue
                behind = self._version - version
                if version and behind <= len(self._frames):
                    frame, version = b"".join(list(self._frames)[-behind:]), self._version
                else:
                    version = self._version
                    frame = await self._encoded_whole()
                yield frame
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._wanted.clear()
                # What is kept would be old when somebody comes again.
                self._state, self._version, self._whole = None, 0, None
                self._frames.clear()

    async def _awaited(self) -> bytes:
        """Returns when there is another version, with nothing, or a comment where that takes long: a proxy may cut what is silent."""
        try:
            await asyncio.wait_for(self._news.wait(), _HEARTBEAT_SECONDS)
        except TimeoutError:
            return b":\n\n"
        return b""

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            began = self._clock.now()
            async with self._reading:
                await self._look()
            await asyncio.sleep(max(self._interval, (self._clock.now() - began) * (_SHARE - 1)))

    async def _look(self) -> None:
        old = self._state
        if old is None:
            return
        new = await self._read()
        frame = await asyncio.to_thread(_change, old, new)
        if not frame or self._state is not old:  # nothing is another, or all have gone meanwhile
            return
        self._state, self._whole = new, None
        self._version += 1
        self._frames.append(frame)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _encoded_whole(self) -> bytes:
        """Made once for all who begin at this version."""
        if self._whole is None:
            assert self._state is not None
            self._whole = asyncio.create_task(asyncio.to_thread(_event, "state", encoded(self._state)))
        return await asyncio.shield(self._whole)


def _change(old: State, new: State) -> bytes:
    """Empty: there is none."""
    found = changes(old, new)
    return _event("change", encoded(found)) if len(found) > 1 else b""


def _event(name: str, data: bytes) -> bytes:
    # JSON on one line: it has no line break that would end the data.
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
