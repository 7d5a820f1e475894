"""The pages of an image in memory, and the fill: copied into restored processes by many threads while CRIU holds them.

The arena is anonymous memory of the agent with huge pages: only this process reads it, so nothing is gained by a file, and a crash
leaves nothing. CRIU itself fills with one thread, page by page, and does not notice a flipped bit; here every chunk was verified on its
way into the arena.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import thaw_native

from restore_agent.chunks import Chunk, ChunkStore

HUGE = 2 << 20
_THREADS = max(2, min(16, os.cpu_count() or 2))  # measured: 16 threads fill 30 GB/s on an H200 host, 8 fill 20
_INDEX_ENTRY = struct.Struct("<QQQ")  # pid, address, length


class FillError(Exception):
    """Pages could not be copied into a process."""


class _Piece(ctypes.Structure):
    _fields_ = (("pid", ctypes.c_uint64), ("address", ctypes.c_uint64), ("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


_library = ctypes.CDLL(str(thaw_native.PAGE_FILL), use_errno=True)
_library.page_fill.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
_library.page_fill.restype = ctypes.c_int


def write_index(path: Path, index: Sequence[tuple[int, int, int]]) -> None:
    """`index`: (pid, address, length) of each run, in the order of the chunks' bytes."""
    path.write_bytes(b"".join(_INDEX_ENTRY.pack(*entry) for entry in index))


class Arena:
    """One image's pages in memory. `Arena.load` fills it; it is freed when dropped."""

    def __init__(self, size: int, index: bytes) -> None:
        self.size = size
        # On a huge page's boundary, so that all of it is huge pages.
        self._map = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._start = -address % HUGE
        self._address = address + self._start
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._runs = list(_INDEX_ENTRY.iter_unpack(index))
        self._pieces = _pieces(self._runs)

    @classmethod
    async def load(cls, store: ChunkStore, chunks: Sequence[Chunk], index: bytes) -> Arena:
        """Reads and verifies every chunk, several at a time.

        Raises:
            CorruptChunk: one is missing, torn or changed.
        """
        arena = cls(sum(chunk.size for chunk in chunks), index)
        if sum(length for _, _, length in arena._runs) != arena.size:
            raise FillError("the index of pages and the chunks differ in size")
        stopped = False

        def read(chunk: Chunk, target: memoryview) -> None:
            if not stopped:
                store.read_into(chunk, target)

        loop = asyncio.get_running_loop()
        memory = memoryview(arena._map)
        pool = ThreadPoolExecutor(_THREADS, "stage")
        reads, at = [], arena._start
        for chunk in chunks:
            reads.append(loop.run_in_executor(pool, read, chunk, memory[at : at + chunk.size]))
            at += chunk.size
        try:
            await asyncio.gather(*reads)
        finally:
            # No thread may be left that writes into memory that is about to go.
            stopped = True
            await asyncio.shield(asyncio.gather(*reads, return_exceptions=True))
            pool.shutdown(wait=False)
        return arena

    @property
    def pids(self) -> set[int]:
        return {pid for pid, _, _ in self._runs}

    async def fill(self, host_pids: Mapping[int, int]) -> float:
        """Copies every page into the processes; `host_pids`: pid in the image → pid on this host. Returns the seconds it took.

        Raises:
            FillError: a process or a mapping is not there; the restore must be given up.
        """
        if missing := self.pids - host_pids.keys():
            raise FillError(f"the image has pages of pid {sorted(missing)}, which CRIU did not restore")
        return await asyncio.to_thread(self._fill, host_pids)

    def _fill(self, host_pids: Mapping[int, int]) -> float:
        begin = time.monotonic()
        pieces = (_Piece * len(self._pieces)).from_buffer_copy(self._pieces)
        if any(pid != host for pid, host in host_pids.items()):
            for piece in pieces:
                piece.pid = host_pids[piece.pid]
        failed = ctypes.c_uint64()
        error = _library.page_fill(self._address, pieces, len(pieces), _THREADS, ctypes.byref(failed))
        if error:
            raise FillError(f"cannot fill the page at {failed.value:#x}: {os.strerror(error)}")
        return time.monotonic() - begin

    def runs(self) -> Sequence[tuple[int, int, memoryview]]:
        """(pid in the image, address, content) of each run."""
        found, at, memory = [], self._start, memoryview(self._map)
        for pid, address, length in self._runs:
            found.append((pid, address, memory[at : at + length]))
            at += length
        return found


def _pieces(runs: Sequence[tuple[int, int, int]]) -> ctypes.Array[_Piece]:
    """Runs joined where they touch (CRIU ends one every 256 pages), then cut at the target's huge pages (page_fill.c says why)."""
    pieces: list[_Piece] = []
    offset = 0
    for pid, start, length in runs:
        at, end = start, start + length
        while at < end:
            n = min(end - at, HUGE - at % HUGE)
            last = pieces[-1] if pieces else None
            if last and last.pid == pid and last.address + last.length == at and at % HUGE:
                last.length += n
            else:
                pieces.append(_Piece(pid, at, offset, n))
            at += n
            offset += n
    return (_Piece * len(pieces))(*pieces)
