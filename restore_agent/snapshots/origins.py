"""In which stores this node's snapshots stand besides: those that it fetched them from, and those that it put them into.

It is what was so, and no more: who counts on it asks the store. One small file for each snapshot, of the node's own; where it is lost, its
snapshot is taken for the only copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from zerowake_shared import durable


class Origins:
    """Of one state folder. Its calls block on the disk."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "node" / "stores"
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if not (state / "snapshots" / path.name).exists():  # it was removed or replaced
                path.unlink(missing_ok=True)

    def of(self, digest: str) -> list[str]:
        """URLs; empty: none is known."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self._folder / digest).read_text().split()
        return []

    def add(self, digest: str, urls: Iterable[str]) -> None:
        """Where it cannot be written down, it is not known: nobody is told."""
        known = self.of(digest)
        if new := [url for url in dict.fromkeys(urls) if url not in known]:
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                durable.replace(self._folder / digest, "\n".join([*known, *new, ""]).encode())

    def forget(self, digest: str) -> None:
        """It is not on this node any more. Raises OSError."""
        (self._folder / digest).unlink(missing_ok=True)
