"""What gpumem needs of a device's memory, a GPU's or the host's: the same calls for both.

`host.py` implements them with memfds, `cuda.py` with CUDA's virtual memory functions. Which one a device has follows from what it is, never
from a flag for tests: the host's is a real mode, for CPU models.

Physical memory is a file descriptor from the moment it exists: it can be sent to another process, and lives as long as a descriptor or a
mapping of it does, in any process. It is always mapped whole (CUDA takes no offset into an allocation).
"""

from __future__ import annotations

from typing import Protocol

HOST = "host"


class MemoryFailed(Exception):
    """The device or its driver refused; the message has its own words."""


class DeviceFull(MemoryFailed):
    """There is not that much free memory on the device."""


class StillWritable(MemoryFailed):
    """Somebody has the memory mapped to write."""


class Mapped(Protocol):
    """One piece of physical memory at its address in this process."""

    address: int
    size: int

    def close(self) -> None:
        """Unmaps it and lets go of the imported memory; the address range stays reserved. Twice does nothing."""


class Memory(Protocol):
    """All sizes and addresses are bytes and multiples of `granularity`, except for copies. Every call may be made from any thread.

    Each raises MemoryFailed. Streams are numbers, 0 to `streams` - 1: what is started on one is done in order.
    """

    @property
    def identity(self) -> str:
        """The GPU's UUID as NVML writes it (`GPU-…`), or `host`."""

    @property
    def granularity(self) -> int: ...

    @property
    def slab(self) -> int:
        """How large the pieces are that memory is best held in."""

    @property
    def addressable(self) -> bool:
        """The processor may read and write mapped memory directly."""

    @property
    def streams(self) -> int: ...

    def move(self, identity: str) -> None:
        """This process was restored with that GPU in the place of this one: CUDA has it under the same ordinal."""

    def free(self) -> tuple[int, int]:
        """Bytes free and in all, without a context."""

    def create(self, size: int) -> int:
        """New physical memory, all zeros, as a descriptor that the caller closes. Needs no CUDA context. Raises DeviceFull."""

    def reserve(self, size: int) -> int:
        """An address range with nothing mapped in it. It survives a CUDA checkpoint."""

    def unreserve(self, address: int, size: int) -> None: ...

    def map(self, address: int, fd: int, size: int, writable: bool) -> Mapped:
        """Maps all `size` bytes of the memory behind `fd` at an address inside a reserved range. `fd` stays the caller's."""

    def is_mapped(self, address: int) -> bool:
        """Whether memory is mapped at an address of a reserved range, asked from the system, not from our own books."""

    def seal(self, fd: int) -> None:
        """From now on nobody can write to this memory, where the system can enforce that (CUDA cannot). Raises StillWritable."""

    def pin(self, address: int, size: int) -> None:
        """Makes host memory fast to copy from, for the life of this process. Slow itself: once, at start."""

    def copy_from_host(self, address: int, source: int, size: int, stream: int) -> None:
        """Starts a copy from host memory of this process (pinned, to be fast)."""

    def copy(self, address: int, source: int, size: int, stream: int) -> None:
        """Starts a copy between mapped memory, of this device or from another's."""

    def synchronize(self, stream: int) -> None:
        """Waits for all that was started on a stream. Raises MemoryFailed for whatever failed there."""
