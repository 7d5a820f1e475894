"""The host's memory as `gpumem.hardware.memory` describes one: a slab is a memfd whose pages are there already.

What CUDA can only ask of its clients, memfds enforce: sealed memory is written by nobody, and nobody makes a slab shorter under a reader.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias

from gpumem.hardware.memory import HOST, DeviceFull, MemoryFailed, StillWritable

NAME = "gpumem"  # /proc/PID/maps shows slabs as /memfd:gpumem
_PROT_NONE = 0
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_FAILED = ctypes.c_void_p(-1).value
_MEMINFO = Path("/proc/meminfo")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


HugePagesOn: TypeAlias = Callable[[], AbstractContextManager[None]]


class HostMemory:
    """The host's memory as a device. Implements `gpumem.hardware.memory.Memory`."""

    identity = HOST
    granularity = 2 << 20  # a huge page, so that a slab can be made of them
    addressable = True
    streams = 1

    def __init__(self, slab: int = 64 << 20, huge_pages: HugePagesOn = contextlib.nullcontext) -> None:
        """
        Args:
            slab: bytes; how large the pieces are that memory is best held in.
            huge_pages: within it, the kernel gives memfds huge pages; needed by whoever makes memory, not by those who only map it.
        """
        self.slab = slab
        self._huge_pages = huge_pages

    def move(self, identity: str) -> None:
        """There is one host."""

    def free(self) -> tuple[int, int]:
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        kilobytes = {words[0]: int(words[1]) for words in lines}
        return kilobytes["MemAvailable:"] << 10, kilobytes["MemTotal:"] << 10

    def create(self, size: int) -> int:
        try:
            fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise MemoryFailed(f"no new memfd: {error}; raise the limit of open files (RLIMIT_NOFILE) or hold less") from error
        try:
            # Asked first: the kernel does not refuse memory that it lacks, it kills a process for it.
            if self.free()[0] < size:
                raise DeviceFull(f"the host has less than {size} bytes of memory available")
            os.ftruncate(fd, size)
            with self._huge_pages():
                populate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as error:
            os.close(fd)
            raise DeviceFull(f"the host has no {size} bytes more: {error}") from error
        except BaseException:
            os.close(fd)
            raise
        return fd

    def reserve(self, size: int) -> int:
        return _mmap(0, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)

    def unreserve(self, address: int, size: int) -> None:
        if _libc.munmap(address, size) != 0:
            raise MemoryFailed(f"munmap of {size} bytes at {address:#x}: {os.strerror(ctypes.get_errno())}")

    def map(self, address: int, fd: int, size: int, writable: bool) -> HostMapped:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        _mmap(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
        return HostMapped(address, size)

    def is_mapped(self, address: int) -> bool:
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, _, end = line.split(maxsplit=1)[0].partition("-")
            if int(start, 16) <= address < int(end, 16):
                return f"/memfd:{NAME}" in line
        return False

    def seal(self, fd: int) -> None:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        except OSError as error:
            raise StillWritable(f"somebody has the memory mapped to write ({error})") from error

    def pin(self, address: int, size: int) -> None:
        """Nothing to do: the processor copies."""

    def copy_from_host(self, address: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(address, source, size)

    def copy(self, address: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(address, source, size)

    def synchronize(self, stream: int) -> None:
        """Nothing to wait for: copies return when they are done."""


class HostMapped:
    """A memfd that is mapped. Implements `gpumem.hardware.memory.Mapped`."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self._mapped = True

    def close(self) -> None:
        if self._mapped:
            # In one step, so that nothing else can come to lie in the range.
            _mmap(self.address, self.size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, -1)
            self._mapped = False


def view(address: int, size: int) -> memoryview:
    """The bytes at an address that is mapped; reading them after it no longer is kills the process."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def populate(fd: int, size: int, threads: int = 1) -> None:
    """Brings every page of a memfd into memory, as huge pages where the kernel gives any: several times faster than one `fallocate`,
    and whoever maps it has 512 times fewer faults.

    Raises:
        DeviceFull: there is not that much memory.
    """
    address = _mmap(0, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd)
    failed: list[int] = []

    def touch(start: int, length: int) -> None:
        if _libc.madvise(start, length, _MADV_POPULATE_WRITE) != 0:
            failed.append(ctypes.get_errno())

    try:
        _libc.madvise(address, size, _MADV_HUGEPAGE)
        share = -(-size // threads)
        share += -share % HostMemory.granularity
        parts = [(address + at, min(share, size - at)) for at in range(0, size, share)]
        if len(parts) == 1:
            touch(*parts[0])
        else:
            workers = [threading.Thread(target=touch, args=part, name="populate") for part in parts]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    finally:
        _libc.munmap(address, size)
    if failed:
        raise DeviceFull(f"the host has no {size} bytes: {os.strerror(failed[0])}; hold less, or a smaller arena")


def map_arena(fd: int, size: int) -> int:
    """Maps an arena that is populated, for good, with its page tables. Returns its address."""
    address = _mmap(0, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd)
    _libc.madvise(address, size, _MADV_HUGEPAGE)
    _libc.madvise(address, size, _MADV_POPULATE_WRITE)
    return address


def _mmap(address: int, size: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size, protection, flags, fd, 0)
    if found is None or found == _FAILED:
        raise MemoryFailed(f"mmap of {size} bytes: {os.strerror(ctypes.get_errno())}")
    return int(found)
