"""Chunks brought from whichever source has them, each verified as it streams.

Many streams run at once: one is bound by a connection's window and a server's patience, and reaches a small part of what a network
carries. A chunk is asked of its sources in the order in which they are given. The next one is asked where a source does not have it,
refuses, breaks off, ends early, is slow, or has sent something else; the next chunk begins with the first source again, for a source that
lost one chunk may have all others. Only one that could not be reached is asked last for a few seconds, or each chunk would wait for its
time to run out.

What came before a break is kept, and the next source goes on behind it. If the whole then has another hash, nobody knows who has lied: the
chunk is brought anew from one source alone. The hash is taken on the way, so nothing is read twice; nothing that is not verified is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from blake3 import blake3

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.layout import chunk_key
from restore_agent.transfer.source import Absent, Altered, Denied, Piece, Source, TransferError, Unreachable
from restore_agent.transfer.streams import STREAMS, Room, in_streams
from zerowake_shared.background import to_its_end
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_INLINE = 64 << 10  # bytes; what is hashed and copied sooner than a thread is found for it


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a source is waited for; seconds, bytes a second."""

    stall: float = 10.0  # without a byte, after which any source is left
    floor: float = 256 << 10  # a stream below it is left where another source can be asked
    aside: float = 5.0  # for so long one that could not be reached is asked last
    rounds: int = 4  # tries of each source that may find better
    pause: float = 0.25  # before the second; doubled before each other


class Fetch:
    """What is fetched for one purpose. Several may run at once, on the same sources and store."""

    def __init__(
        self,
        sources: Callable[[Chunk], Sequence[Source]],
        *,
        streams: int = STREAMS,
        patience: Patience = Patience(),
        clock: Clock = SYSTEM_CLOCK,
        moved: Callable[[int], None] = lambda count: None,
        left: Callable[[Source, TransferError], None] = lambda source, error: None,
    ) -> None:
        """`sources`: of one chunk, the best first. `moved` hears, in the loop, of bytes that came; below zero: that were lost again. `left`
        hears of each source that did not give a chunk, and why."""
        self._sources = sources
        self._streams = streams
        self._patience = patience
        self._clock = clock
        self._moved = moved
        self._left = left
        self._failed: dict[Source, float] = {}  # when each could not be reached

    async def bring(self, chunk: Chunk, target: memoryview) -> None:
        """Fills `target`, of the chunk's size, with its verified bytes.

        Raises:
            Absent: no source has it. Altered, Denied, Unreachable: what the gravest of the sources did, and what the others did.
        """
        await self._bring(_Arriving(chunk, lambda: target, self._moved))

    async def _bring(self, arriving: _Arriving) -> None:
        chunk = arriving.chunk
        left = list(self._sources(chunk))
        failures: dict[str, TransferError] = {}
        for attempt in range(self._patience.rounds):
            if attempt:
                await asyncio.sleep(self._patience.pause * 2 ** (attempt - 1))
            for source in sorted(left, key=self._is_aside):
                try:
                    await self._take(source, arriving, hurry=len(left) > 1)
                except TransferError as error:
                    failures[str(source)] = error
                    self._left(source, error)
                    if isinstance(error, Unreachable):
                        self._failed[source] = self._clock.now()
                    else:
                        left.remove(source)
                else:
                    self._failed.pop(source, None)
                    return
            if not left:
                break
        arriving.forget()
        raise gravest(failures.values(), f"chunk {chunk.hash} is on no source")

    async def bring_all(
        self, chunks: Iterable[Chunk], keep: Callable[[Chunk, memoryview], None], arrived: Callable[[Chunk], None] = lambda chunk: None
    ) -> None:
        """Brings each of them. `keep` is called in a thread with the verified bytes, which are gone when it returns; then `arrived`, in the
        loop. When this returns or raises, no thread is left that keeps one.

        Raises:
            TransferError: as `bring`, of the first chunk that no source gave. OSError: what `keep` raised.
        """
        with ThreadPoolExecutor(self._streams, "keep") as threads:

            async def bring_one(chunk: Chunk, room: Room) -> None:
                arriving = _Arriving(chunk, lambda: room.of(chunk.size), self._moved, lambda data: keep(chunk, data), threads)
                await self._bring(arriving)
                await arriving.keep_all()
                arrived(chunk)

            await in_streams(chunks, self._streams, bring_one)

    def _is_aside(self, source: Source) -> bool:
        failed = self._failed.get(source)
        return failed is not None and self._clock.now() - failed < self._patience.aside

    async def _take(self, source: Source, arriving: _Arriving, *, hurry: bool) -> None:
        """The rest of a chunk from this source; all of it, if the rest does not fit to what others gave."""
        while True:
            began_at = arriving.done
            await self._stream(source, arriving, hurry=hurry)
            if arriving.is_whole():
                return
            arriving.forget()
            if not began_at:
                raise Altered(f"{source} has other bytes under the name of {arriving.chunk.hash}: replace it from a whole copy")

    async def _stream(self, source: Source, arriving: _Arriving, *, hurry: bool) -> None:
        rest = arriving.chunk.size - arriving.done
        until = self._clock.now() + self._patience.stall + rest / self._patience.floor if hurry else float("inf")
        async with contextlib.aclosing(source.read(chunk_key(arriving.chunk.hash), arriving.done, rest)) as pieces:
            while arriving.done < arriving.chunk.size:
                wait = min(self._patience.stall, until - self._clock.now())
                try:
                    async with asyncio.timeout(wait):
                        piece = await anext(pieces, None)
                except TimeoutError:
                    slow = "is slow" if wait < self._patience.stall else f"sent nothing for {self._patience.stall:g} s"
                    raise Unreachable(f"{source} {slow}: left after {arriving.done} of {arriving.chunk.size} bytes") from None
                if piece is None:
                    break
                await arriving.add(piece, source)
        if arriving.done < arriving.chunk.size:
            left = f"{arriving.done} of its {arriving.chunk.size} bytes"
            raise Altered(f"{source} has {left} under the name of {arriving.chunk.hash}: replace it from a whole copy")


class _Arriving:
    """A chunk on its way: what has come of it, from any sources one after the other.

    A piece that is all of it is hashed and kept where it lies, in one go; others come together in memory of ours.
    """

    def __init__(
        self,
        chunk: Chunk,
        room: Callable[[], memoryview],
        moved: Callable[[int], None],
        keep: Callable[[memoryview], None] | None = None,
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        """`room`: the memory for its pieces. `keep` is called in one of the threads, once, with bytes that were verified."""
        self.chunk = chunk
        self.done = 0
        self._room = room
        self._moved = moved
        self._keep = keep
        self._threads = threads
        self._kept = False
        self._hasher = blake3()

    async def add(self, piece: Piece, source: Source) -> None:
        """Raises Altered: it is more than the chunk has. What `keep` raises."""
        end = self.done + len(piece)
        if end > self.chunk.size:
            self.forget()
            raise Altered(f"{source} sent more than the {self.chunk.size} bytes of {self.chunk.hash}")
        if len(piece) <= _INLINE:
            self._take(piece, self._room()[self.done : end])
        elif self._keep and len(piece) == self.chunk.size:
            await self._in_thread(self._take_whole, piece)
        else:
            await self._in_thread(self._take, piece, self._room()[self.done : end])
        self.done = end
        self._moved(len(piece))

    def is_whole(self) -> bool:
        return self._hasher.hexdigest() == self.chunk.hash

    async def keep_all(self) -> None:
        """It is whole: it is kept, unless it was as it came. Raises what `keep` does."""
        if self._keep and not self._kept:
            await self._in_thread(self._keep, self._room())

    def forget(self) -> None:
        """Nothing of it has come."""
        self._moved(-self.done)
        self.done = 0
        self._hasher = blake3()

    async def _in_thread(self, work: Callable[..., None], *arguments: Piece) -> None:
        await to_its_end(asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments))

    def _take(self, piece: Piece, target: memoryview) -> None:
        target[:] = piece
        self._hasher.update(target)  # of the copy: the piece may be memory that its sender still writes to

    def _take_whole(self, piece: Piece) -> None:
        self._hasher.update(piece)
        if self._keep and self.is_whole():
            self._keep(memoryview(piece))
            self._kept = True


def gravest(errors: Iterable[TransferError], nobody: str) -> TransferError:
    """What is told where several sources failed: first what somebody can mend, then what the others did. `nobody`: there was no source."""
    told = list(dict.fromkeys(errors))
    for word in (Denied, Altered, Unreachable, Absent):
        for first in told:
            if isinstance(first, word):
                return word("; and ".join(dict.fromkeys([str(first), *map(str, told)])))
    return Absent(nobody)
