"""Which of this node's snapshots a cluster's controller had brought here: captured in a pod that it made, or fetched as it asked.

Such a one is the controller's to remove when no object asks for it any more. One that a person has pulled or taken here is not, whatever
its name is: a pull by hand of what is here already makes it that person's. One empty file for each, of the node's own; where it is lost,
its snapshot is taken for a person's, and stays.
"""

from __future__ import annotations

from pathlib import Path

from zerowake_shared import durable


class Managed:
    """Of one state folder. `add` and `remove` block on the disk; `in` asks memory."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "node" / "managed"
        self._digests: set[str] = set()
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if (state / "snapshots" / path.name).exists():
                self._digests.add(path.name)
            else:  # it was removed or replaced
                path.unlink(missing_ok=True)

    def __contains__(self, digest: str) -> bool:
        return digest in self._digests

    def add(self, digest: str) -> None:
        """Raises OSError: it is nobody's still."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.replace(self._folder / digest, b"")
        self._digests.add(digest)

    def remove(self, digest: str) -> None:
        """It is a person's now, or not here any more. Raises OSError: it is the controller's still."""
        if digest in self._digests:
            (self._folder / digest).unlink(missing_ok=True)
            self._digests.remove(digest)
