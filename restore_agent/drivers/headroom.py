"""Memory kept for the next restore: as much as the largest image that stands in memory, already backed by the machine.

A restore's time is the fill's, and the fill's is page faults. On a virtual machine a page that was free for a few seconds has gone back to
the hypervisor (free page reporting), and the first touch of each costs a fault outside: 340 MB took 0.54 s instead of 0.06. So the agent
holds touched huge pages and lets go of them when a restore begins; the kernel's free lists hand the same pages to the fill, whole, so that
huge pages are not missing for fragmentation either. It takes them again a little later, when the new replica has answered.
Rejected: handing pages over without the free lists (no call moves pages between processes), and a pool of idle processes to restore into
(CRIU makes its processes itself).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import mmap
import os
import threading

from restore_agent.drivers.meminfo import available_memory
from zerowake_shared.background import told

_MARGIN = 1.25  # the fill takes whole huge pages where the image has gaps
_SHARE = 4  # at most a quarter of what is available
_PAUSE_SECONDS = 2.0  # after the last restore: its replica is answering its first requests
_PATIENCE_SECONDS = 5.0
_STEP = 2 << 20  # bytes touched at a time: the process cannot map anything meanwhile, nor start a thread
_HUGE = 2 << 20
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_LOG = logging.getLogger("zerowake.agent")


class Headroom:
    """The reserve of one node."""

    def __init__(self) -> None:
        self._wanted = 0
        self._reserve: mmap.mmap | None = None
        self._refill: asyncio.Task[None] | None = None
        self._stop = threading.Event()

    def want(self, size: int) -> None:
        """Bytes to hold from now on, where a quarter of the available memory allows it."""
        size = int(size * _MARGIN) // _HUGE * _HUGE
        if size != self._wanted:
            self._wanted = size
            self._release()
            self._refill_after(0.0)

    async def taken(self) -> None:
        """Returns when the reserve is held, or a restore has begun, or a while has passed: it gives way to everything else."""
        if self._refill:
            await asyncio.wait([self._refill], timeout=_PATIENCE_SECONDS)

    def give(self) -> None:
        """A restore begins: the reserve is free within milliseconds, and is taken again when restores have been over for a while."""
        self._release()
        self._refill_after(_PAUSE_SECONDS)

    async def close(self) -> None:
        self._wanted = 0
        self._release()
        if self._refill:
            await asyncio.gather(self._refill, return_exceptions=True)

    def _release(self) -> None:
        self._stop.set()
        if self._refill:
            self._refill.cancel()
        if self._reserve is not None:
            reserve, self._reserve = self._reserve, None
            # Freeing takes milliseconds, CRIU's first steps longer: neither waits for the other.
            try:
                threading.Thread(target=reserve.close, name="headroom").start()
            except RuntimeError:  # no thread can be started now, which is no reason for the restore to fail
                reserve.close()

    def _refill_after(self, pause: float) -> None:
        self._stop = threading.Event()
        self._refill = asyncio.create_task(self._take(pause, self._stop), name="headroom")
        told(self._refill, _LOG)

    async def _take(self, pause: float, stop: threading.Event) -> None:
        await asyncio.sleep(pause)
        size = min(self._wanted, available_memory() // _SHARE // _HUGE * _HUGE)
        if size:
            try:
                reserve = await asyncio.shield(asyncio.to_thread(_touched, size, stop))
            except (OSError, RuntimeError) as error:  # no memory for this process, or no thread
                _LOG.warning("no memory is held ready for the next restore, which is slower for it: %s", error)
                return
            if stop.is_set():
                reserve.close()
            else:
                self._reserve = reserve


def _touched(size: int, stop: threading.Event) -> mmap.mmap:
    """Anonymous huge pages, each touched, by a thread that gives way to everything else."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    try:
        reserve = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        reserve.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(reserve))
        for at in range(0, size, _STEP):
            if stop.is_set():
                break
            # By ctypes, since mmap.madvise would hold the interpreter's lock through every fault.
            if _libc.madvise(ctypes.c_void_p(address + at), ctypes.c_size_t(min(_STEP, size - at)), _MADV_POPULATE_WRITE):
                break  # no memory, or a kernel before 5.14: hold what there is
    finally:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 0)
    return reserve
