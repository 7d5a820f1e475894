"""The sandboxes of a node: what they have in common, and one that stands ready for the next restore.

To make one takes milliseconds of the disk's and the kernel's, and a restore has none to give away. So behind each staging and each restore
another sandbox is made with the same shared folders. It is used as long as it is what would be made now: no mount has come or gone, and
every shared folder is the one that it was. One that is not, or was killed, is closed when the next is made, since nobody would take it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from restore_agent.places.place import PlaceError
from restore_agent.places.sandbox import Sandbox
from zerowake_shared.background import ended

_MOST = 4  # that stand ready: for as many models that share other folders
_LOG = logging.getLogger("zerowake.agent")
_Key = tuple[tuple[str, ...], str, tuple[tuple[str, int, int], ...]]  # what is asked for, the mounts, the shared folders as they are


@dataclass(frozen=True)
class Sandboxes:
    """Use it between `Node.open` and its end: `close` it."""

    kdat: Path  # CRIU's kernel probe
    layers: Path
    gpumem: Path  # its socket
    checkpoints: Path  # where engines put down the weights that gpumem is to read
    _ready: dict[_Key, Sandbox] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _making: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def create(self, shared: Sequence[str] = ()) -> Sandbox:
        """See Sandbox.create; what engines and gpumem tell each other is shared always."""
        sandbox = self._ready.pop(self._key(shared), None)
        if sandbox and not sandbox.has_ended:
            return sandbox
        if sandbox:
            await sandbox.close()
        return await Sandbox.create(self.kdat, self.layers, self._with_ours(shared))

    def make_ready(self, shared: Sequence[str] = ()) -> None:
        """Has one stand ready that `create` will give away; returns at once."""
        task = asyncio.create_task(self._make_ready(shared), name="a sandbox that stands ready")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        await ended(self._tasks)
        await asyncio.gather(*(sandbox.close() for sandbox in self._ready.values()))
        self._ready.clear()

    async def _make_ready(self, shared: Sequence[str]) -> None:
        async with self._making:  # after a burst all of it wants one, and one is made
            for key, sandbox in list(self._ready.items()):
                if sandbox.has_ended or key != self._key(key[0]):
                    del self._ready[key]
                    await sandbox.close()
            key = self._key(shared)
            if key in self._ready:
                return
            if len(self._ready) >= _MOST:
                await self._ready.pop(next(iter(self._ready))).close()
            try:
                self._ready[key] = await Sandbox.create(self.kdat, self.layers, self._with_ours(shared))
            except (PlaceError, OSError) as error:
                _LOG.info("no sandbox stands ready for the next restore: %s", error)  # that one will say so, if it is so still

    def _with_ours(self, shared: Sequence[str]) -> list[str]:
        # A folder of /run is empty otherwise; elsewhere it may be one as /tmp, in which replicas would meet.
        ours = self.gpumem.parent if self.gpumem.parent.is_relative_to("/run") else self.gpumem
        return [*shared, *(str(path) for path in (ours, self.checkpoints) if path.exists())]

    def _key(self, shared: Sequence[str]) -> _Key:
        """What a sandbox is made of: another one of these is another sandbox."""
        folders = []
        for path in self._with_ours(shared):
            with contextlib.suppress(OSError):
                at = os.stat(path)  # noqa: PTH116
                folders.append((path, at.st_dev, at.st_ino))
        return tuple(shared), Path("/proc/self/mountinfo").read_text(), tuple(folders)
