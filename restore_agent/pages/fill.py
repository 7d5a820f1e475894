"""The pages of an image in memory, and the fill: copied into restored processes by many threads while CRIU holds them.

The arena is anonymous memory of the agent with huge pages: only this process reads it, so nothing is gained by a file, and a crash
leaves nothing. CRIU itself fills with one thread, page by page, and does not notice a flipped bit; here every chunk was verified on its
way into the arena.

A fill need not wait for the arena: it takes each chunk as soon as that has been verified, while the next are being read. So a restore
from disk ends when the disk does, and what it read stands in memory afterwards. Rejected: readers that copy the chunk which they have
just verified into every process that waits for it. A process that is given up must then be looked for in all of them, and no read was
saved by it, since copying is several times as fast as any disk.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from restore_agent.errors import AgentError
from restore_agent.pages.native import Filler, Piece, cut
from restore_agent.snapshots.chunks import Chunk, ChunkStore
from restore_agent.snapshots.page_runs import PAGE, PageRun, Pages, address_of, read_index

HUGE = 2 << 20
_THREADS = max(2, min(16, os.cpu_count() or 2))  # measured: 16 threads fill 30 GB/s on an H200 host, 8 fill 20
_READERS = 16  # on any number of cores: they wait for the disk, which wants many requests at once
_WORTH_A_THREAD = 2 << 20  # bytes to copy

_ADDRESSES = 1 << 56  # bytes, of a process on any machine that there is

Read = Callable[[Chunk, memoryview], None]


class FillError(AgentError):
    """Pages could not be copied into a process."""

    reason = "fill-failed"


def _is_run(run: PageRun) -> bool:
    """Whether those can be pages of a process. The fill counts with it: an address beyond the last would wrap around."""
    return run.length > 0 and not (run.address | run.length) % PAGE and run.address + run.length <= _ADDRESSES and run.pid < 1 << 31


class Arena:
    """One image's pages, in memory or on their way there (`read`). It is freed when dropped."""

    def __init__(self, chunks: Sequence[Chunk], index: bytes) -> None:
        """Raises FillError where the index and the chunks differ."""
        self.chunks = chunks
        self._ends = list(accumulate(chunk.size for chunk in chunks))
        self._numbers = {chunk.hash: number for number, chunk in enumerate(chunks)}
        self.size = self._ends[-1] if chunks else 0
        self._runs = read_index(index)
        if len(index) % ctypes.sizeof(PageRun) or not all(map(_is_run, self._runs)):
            raise FillError("the index of pages is torn, or names what is no page of a process; take the snapshot again")
        if sum(run.length for run in self._runs) != self.size:
            raise FillError("the index of pages and the chunks differ in size")
        self._pieces, self._lasts = cut(self._runs, self._ends)
        # On a huge page's boundary, so that all of it is huge pages.
        self._map = mmap.mmap(-1, self.size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._start = -address_of(memoryview(self._map)) % HUGE
        self._memory = memoryview(self._map)[self._start : self._start + self.size]
        self._news = threading.Condition()  # for the three below
        self._paused = False
        self._arrived: list[int] = []  # chunks that are there and verified, as they came
        self._failure: BaseException | None = None  # no more will come

    @classmethod
    async def load(cls, store: ChunkStore, chunks: Sequence[Chunk], index: bytes) -> Arena:
        """The whole image. Raises CorruptChunk, FillError."""
        arena = cls(chunks, index)
        await arena.read(store.read_into)
        return arena

    async def read(self, read: Read) -> None:
        """Brings every chunk, many at a time; `read` fills memory with one and verifies it.

        Raises:
            Exception: what `read` raised; so does every fill that waits.
        """
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(_READERS, "stage")
        numbers = iter(range(len(self.chunks)))  # each reader takes the next: a large image would be thousands of futures
        reads = [loop.run_in_executor(pool, self._read_some, numbers, read) for _ in range(_READERS)]
        try:
            await asyncio.gather(*reads)
        except BaseException as error:
            self._fail(error if isinstance(error, Exception) else FillError("staging was cancelled"))
            raise
        finally:
            # No thread may be left that writes into memory that is about to go.
            await asyncio.shield(asyncio.gather(*reads, return_exceptions=True))
            pool.shutdown(wait=False)

    def _read_some(self, numbers: Iterator[int], read: Read) -> None:
        for number in numbers:
            with self._news:
                while self._paused and self._failure is None:
                    self._news.wait()
            if self._failure is not None:
                return
            end = self._ends[number]
            read(self.chunks[number], self._memory[end - self.chunks[number].size : end])
            with self._news:
                self._arrived.append(number)
                self._news.notify_all()

    def pause(self, on: bool) -> None:
        """While it is on, no chunk is begun to be read: others need the disk more."""
        with self._news:
            self._paused = on
            self._news.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self._failure = error
            self._news.notify_all()

    @property
    def whole(self) -> bool:
        return len(self._arrived) == len(self.chunks)

    @property
    def arrived_bytes(self) -> int:
        """Of what is there and verified."""
        return sum(self.chunks[number].size for number in list(self._arrived))

    def chunk(self, chunk_hash: str) -> memoryview | None:
        """The bytes of a chunk, of an image that is whole; None: it has no such chunk."""
        number = self._numbers.get(chunk_hash)
        return None if number is None else self._memory[self._ends[number] - self.chunks[number].size : self._ends[number]]

    @property
    def pids(self) -> set[int]:
        return {run.pid for run in self._runs}

    async def fill(self, host_pids: Mapping[int, int], threads: int = _THREADS) -> float:
        """Copies every page into the processes, as it arrives; `host_pids`: pid in the image → pid on this host.

        Returns the seconds that it copied: beside them it may have waited for chunks. Cancelled, it ends once nothing more is written.

        Raises:
            FillError: a process or a mapping is not there; the restore must be given up.
            Exception: why a chunk does not arrive.
        """
        if missing := self.pids - host_pids.keys():
            raise FillError(f"the image has pages of pid {sorted(missing)}, which CRIU did not restore")
        filler = Filler(address_of(self._memory) if self.size else 0, host_pids)
        # A thread of its own: it may wait for a disk, and those that others share are few.
        pool = ThreadPoolExecutor(1, "fill")
        work = asyncio.get_running_loop().run_in_executor(pool, self._fill, filler, threads)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            filler.stop()
            with self._news:
                self._news.notify_all()
            await asyncio.wait([work])
            raise
        finally:
            pool.shutdown(wait=False)

    def _fill(self, filler: Filler, threads: int) -> float:
        copied, seconds = 0, 0.0
        while copied < len(self.chunks) and not filler.stopped:
            with self._news:
                while len(self._arrived) == copied and self._failure is None and not filler.stopped:
                    self._news.wait()
                fresh = self._arrived[copied:]
                if not fresh and self._failure:
                    raise self._failure
            begin = time.monotonic()
            pieces = self._pieces_of(fresh)
            useful = 1 + sum(self.chunks[number].size for number in fresh) // _WORTH_A_THREAD
            error = filler.copy(pieces, min(threads, useful))
            if error and error != errno.ECANCELED:
                raise FillError(f"cannot fill the page at {filler.failed_address:#x}: {os.strerror(error)}")
            copied += len(fresh)
            seconds += time.monotonic() - begin
        return seconds

    def _pieces_of(self, numbers: Sequence[int]) -> ctypes.Array[Piece]:
        if len(numbers) == len(self.chunks):
            return self._pieces
        size, pieces = ctypes.sizeof(Piece), memoryview(self._pieces).cast("B")
        spans = [(self._lasts[number - 1] if number else 0, self._lasts[number]) for number in sorted(numbers)]
        found = b"".join(pieces[first * size : last * size] for first, last in spans)
        return (Piece * (len(found) // size)).from_buffer_copy(found)

    def runs(self) -> Sequence[Pages]:
        """Each run with its bytes, which lie in the arena."""
        found, at = [], 0
        for run in self._runs:
            found.append(Pages(run.pid, run.address, self._memory[at : at + run.length]))
            at += run.length
        return found
