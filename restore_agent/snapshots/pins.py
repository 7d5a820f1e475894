"""What the owners of this node's snapshots have pinned: no budget takes a pinned one from its rung, nor from those below it.

A pin is what was told last: it outlives the agent, and goes when it is taken back or the snapshot is removed. One small file for each
pinned snapshot, of the node's own; one that cannot be read pins nothing, and whoever wishes it sees that and tells it again.
"""

from __future__ import annotations

import contextlib
import enum
from pathlib import Path

from zerowake_shared import durable

REMEDY = "take a pin back (`pin` of a model in zerowake.yaml, or of a ModelSnapshot's spec)"


class Pin(enum.Enum):
    """The highest rung that it keeps."""

    DISK = "disk"
    MEMORY = "memory"


class Pins:
    """Of one state folder. `put` blocks on the disk; everything else asks memory."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "node" / "pins"
        self._pins: dict[str, Pin] = {}
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if not (state / "snapshots" / path.name).exists():  # it was removed or replaced
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError, ValueError):
                self._pins[path.name] = Pin(path.read_text().strip())

    def of(self, digest: str) -> Pin | None:
        return self._pins.get(digest)

    def in_memory(self, digest: str) -> bool:
        return self._pins.get(digest) is Pin.MEMORY

    def put(self, digest: str, pin: Pin | None) -> None:
        """In the place of what was told before; None: it is taken back. Raises OSError: all is as it was."""
        if pin is self._pins.get(digest):
            return
        if pin is None:
            (self._folder / digest).unlink(missing_ok=True)
            del self._pins[digest]
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.replace(self._folder / digest, f"{pin.value}\n".encode())
        self._pins[digest] = pin
