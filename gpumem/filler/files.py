"""A file that large pieces are read from once: from the page cache where they are there, and around it (O_DIRECT) where they are not.

What is read once would only drive others out of the cache, and on two cores the cache's copy halves a disk's rate with few readers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass

from gpumem.wire.errors import Corrupt

BLOCK = 4096  # bytes; what reading around the page cache is aligned to
_SYS_CACHESTAT = 451
_MOSTLY = 0.875  # cached; to ask by a read that may not wait (RWF_NOWAIT) starts reading ahead, which costs O_DIRECT 40 % of its rate
_libc = ctypes.CDLL(None, use_errno=True)


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
        """Reads `target` full. `aligned` is the memory of the whole blocks around it, if reading around the cache may use that.

        Raises:
            Corrupt: the file ends before.
        """
        done = 0
        if aligned is not None and self.around >= 0 and not self._is_cached(offset, len(target)):
            done = self._read_around(offset, target, aligned)
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

    def close(self) -> None:
        os.close(self.fd)
        if self.around >= 0:
            os.close(self.around)
