"""A file that large pieces are read from once: from the page cache where they are there, and around it (O_DIRECT) where they are not.

What is read once would only drive others out of the cache, and on two cores the cache's copy halves a disk's rate with few readers.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from dataclasses import dataclass

from gpumem.wire.errors import Corrupt

BLOCK = 4096  # bytes; what reading around the page cache is aligned to
_BETWEEN = 2 << 20  # bytes; a huge page, of which a disk makes one request: of small ones it would make several, at half its rate
_SYS_CACHESTAT = 451
_MOSTLY = 0.875  # cached; to ask by a read that may not wait (RWF_NOWAIT) starts reading ahead, which costs O_DIRECT 40 % of its rate
_libc = ctypes.CDLL(None, use_errno=True)


class _Between(threading.local):
    """Memory of each thread for bytes that begin elsewhere in a block of the file than in one of their target."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, 2 * _BETWEEN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _BETWEEN
        self.memory = memoryview(memory)[start : start + _BETWEEN]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


_between = _Between()


@dataclass
class File:
    """A file that chunks are read from, through the page cache and around it."""

    fd: int
    around: int  # the same file opened around the cache; -1: its file system cannot

    @staticmethod
    def of(fd: int) -> File:
        """The file behind a descriptor, which is closed with it."""
        try:
            around = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            around = -1
        return File(fd, around)

    def read(self, offset: int, target: memoryview, aligned: memoryview | None) -> None:
        """Reads `target`, which is writable, full. `aligned` is the memory of the whole blocks around it, if reading around the cache may
        use that; else it comes by way of memory between.

        Raises:
            Corrupt: the file ends before.
        """
        done = 0
        if self.around >= 0 and not self._is_cached(offset, len(target)):
            done = self._read_around(offset, target, aligned) if aligned is not None else self._copy_around(offset, target)
        while done < len(target):
            count = os.preadv(self.fd, [target[done:]], offset + done)
            if not count:
                raise Corrupt(f"a source ends {len(target) - done} bytes before the end of its chunk: bring the whole file")
            done += count

    def _is_cached(self, offset: int, size: int) -> bool:
        """Whether nearly all of it is in the page cache; also where the kernel cannot say (it can since 6.5)."""
        asked = (ctypes.c_uint64 * 2)(offset, size)
        found = (ctypes.c_uint64 * 5)()  # pages: cached, dirty, under writeback, evicted, evicted recently
        if _libc.syscall(_SYS_CACHESTAT, self.fd, asked, found, 0) != 0:
            return True
        return found[0] * BLOCK >= size * _MOSTLY

    def _read_around(self, offset: int, target: memoryview, aligned: memoryview) -> int:
        lead = offset % BLOCK  # bytes of `aligned` before `target`
        at, end = 0, lead + len(target)
        with contextlib.suppress(OSError):
            while at < end:
                count = os.preadv(self.around, [aligned[at:]], offset - lead + at)
                at += count
                if not count or count % BLOCK:
                    break
        return max(0, min(at, end) - lead)

    def _copy_around(self, offset: int, target: memoryview) -> int:
        """A copy more than into aligned memory. The page cache takes twice the processor time."""
        between, done = _between, 0
        with contextlib.suppress(OSError):
            while done < len(target):
                lead = (offset + done) % BLOCK
                wanted = min(_BETWEEN, -(-(lead + len(target) - done) // BLOCK) * BLOCK)
                count = os.preadv(self.around, [between.memory[:wanted]], offset + done - lead)
                useful = min(count - lead, len(target) - done)
                if useful <= 0:
                    break
                ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(target, done)), between.address + lead, useful)
                done += useful
                if count % BLOCK:
                    break
        return done

    def close(self) -> None:
        os.close(self.fd)
        if self.around >= 0:
            os.close(self.around)
