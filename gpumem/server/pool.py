"""The pool of one device: memory held ahead of need, as slabs that have never been lent and are all zeros.

A slab that was lent never comes back. A descriptor cannot be called in again: a client that kept one, or a mapping, would see whatever the
next owner writes, and no scrubbing helps against that. So what is given back is let go of and replaced by new memory, which is zeros
because the driver (or the kernel) scrubs it, and whoever kept the old still has only their own bytes. Making memory takes a GPU 0.2 ms a
slab, less than clearing it would. While a device has not yet freed what was given back, the pool is owed it, and asks again and again.

Slabs are of one size at first, but for the rest of the budget. A request for less takes free slabs apart by letting go of them and making
the exact sizes anew, so a small region wastes less than one granule, and regions need no sharing of slabs, which a GPU could not map.
What is given back is replaced by slabs of the same sizes: an engine that wakes asks for what it gave back, and finds it made.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gpumem.hardware.memory import DeviceFull, Memory, MemoryFailed

_RETRY_SECONDS = 0.1  # between two tries to get back what the device has not freed yet

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Slab:
    """One piece of physical memory, which lives as long as somebody has its descriptor."""

    fd: int
    size: int  # bytes


class Short(Exception):
    """The pool has not that much free; `missing` bytes more are needed."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


class Pool:
    """One device's free memory. All calls come from one event loop; whatever asks the device runs in a thread."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._free: list[Slab] = []
        self._spent: list[Slab] = []  # given back, not yet closed and replaced
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, f"memory of {memory.identity}")
        # Started now: of what is given to a thread that cannot be started nobody knows whether it is done.
        self._thread.submit(int).result()
        self._refused = ""  # what the device said last
        self.wanted = 0  # bytes to be held, lent ones included
        self.lent = 0  # bytes

    @property
    def free(self) -> int:
        return sum(slab.size for slab in self._free)

    @property
    def slabs(self) -> int:
        """How many are free."""
        return len(self._free)

    @property
    def owed(self) -> int:
        """Bytes that are to be held and that the device does not have for us now."""
        return max(0, self.wanted - self.free - self.lent)

    def rounded(self, size: int) -> int:
        """Bytes that a request for `size` bytes takes."""
        return -(-size // self._memory.granularity) * self._memory.granularity

    async def acquire(self, size: int) -> list[Slab]:
        """Lends `size` bytes, a multiple of the granularity.

        Raises:
            Short: there is not that much.
            MemoryFailed: the device refuses for another reason.
        """
        async with self._lock:
            if self.free < size:
                await self._refill()
            if self.free < size:
                raise Short(size - self.free)
            taken, lacking, used, left_over = self._plan(size)
            for slab in taken + used:
                self._free.remove(slab)
            try:
                made = await self._make(lacking + left_over, used)
            except BaseException:
                self._free += taken
                raise
            if len(made) < len(lacking):
                self._free += taken + made
                self._wake.set()
                raise Short(sum(lacking) - sum(slab.size for slab in made))
            self._free += made[len(lacking) :]
            self.lent += size
            return taken + made[: len(lacking)]

    def retire(self, slabs: list[Slab]) -> None:
        """Takes lent slabs out of use; new ones come in their place."""
        self._spent += slabs
        self.lent -= sum(slab.size for slab in slabs)
        self._wake.set()

    async def resize(self, wanted: int) -> None:
        """Holds more or less from now on: what is free and too much is given back before this returns; what is lent stays."""
        async with self._lock:
            self.wanted = wanted // self._memory.granularity * self._memory.granularity
            excess = self.free + self.lent - self.wanted
            used = []
            for slab in sorted(self._free, key=lambda slab: slab.size):
                if excess > 0:
                    excess -= slab.size
                    used.append(slab)
            for slab in used:
                self._free.remove(slab)
            self._spent += used
            await self._refill()

    async def replenish(self) -> None:
        """Replaces what was given back, for as long as the server runs."""
        self._wake.set()  # where it is begun again, something may be left
        while True:
            await self._wake.wait()
            self._wake.clear()
            async with self._lock:
                await self._refill()
            if self.owed >= self._memory.granularity:
                await asyncio.sleep(_RETRY_SECONDS)
                self._wake.set()

    def close(self) -> None:
        self._thread.shutdown()
        for slab in self._free + self._spent:
            os.close(slab.fd)
        self._free, self._spent = [], []

    def _sizes(self, size: int) -> list[int]:
        whole, rest = divmod(size, self._memory.slab)
        return [self._memory.slab] * whole + ([rest] if rest else [])

    def _replacing(self, spent: list[Slab], size: int) -> list[int]:
        """Sizes, of `size` bytes in all, to make in the place of slabs that were given back: theirs, as far as that goes."""
        sizes = []
        for slab in spent:
            if slab.size <= size:
                sizes.append(slab.size)
                size -= slab.size
        return sizes + self._sizes(size)

    def _plan(self, size: int) -> tuple[list[Slab], list[int], list[Slab], list[int]]:
        """Slabs to lend as they are; sizes that are lacking; slabs to take apart for them; sizes to make of what these leave over."""
        free = list(self._free)
        taken: list[Slab] = []
        lacking: list[int] = []
        for want in self._sizes(size):
            found = next((slab for slab in free if slab.size == want), None)
            if found is None:
                lacking.append(want)
            else:
                free.remove(found)
                taken.append(found)
        used: list[Slab] = []
        surplus = -sum(lacking)
        for slab in sorted(free, key=lambda slab: slab.size):
            if surplus >= 0:
                break
            surplus += slab.size
            used.append(slab)
        return taken, lacking, used, self._sizes(max(0, surplus))

    async def _refill(self) -> None:
        spent, self._spent = self._spent, []
        held = self.free + self.lent
        try:
            self._free += await self._make(self._replacing(spent, max(0, self.wanted - held)), spent)
            self._refused = ""
        except MemoryFailed as error:
            if str(error) != self._refused:
                self._refused = str(error)
                logger.warning("%s: no memory to hold, trying on: %s", self._memory.identity, error)

    async def _make(self, sizes: list[int], used: list[Slab]) -> list[Slab]:
        """Lets go of `used` and makes as many of `sizes` as there is memory for. Done even when the caller is cancelled meanwhile."""
        if not sizes and not used:
            return []
        made: list[Slab] = []
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._make_now, sizes, used, made)
        try:
            await asyncio.shield(work)
        except BaseException:
            await asyncio.wait([work])
            self._free += made
            raise
        return made

    def _make_now(self, sizes: list[int], used: list[Slab], made: list[Slab]) -> None:
        for slab in used:
            os.close(slab.fd)
        for size in sizes:
            try:
                made.append(Slab(self._memory.create(size), size))
            except DeviceFull:
                return
