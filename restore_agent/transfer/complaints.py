"""What sources did wrong while others gave what was asked of them.

A copy with other bytes, a store that denies: whoever fetches goes on with the next source, and all is well until that one is away. So each
is told once a fetch, with the source's name. One that does not have something, or does not answer, is no matter for a complaint: that is
told where nobody else has it either.
"""

from __future__ import annotations

from restore_agent.snapshots.keyring import Untrusted
from restore_agent.transfer.source import Altered, Denied, Source

_KEPT = 16  # sources and kinds; a fleet that is worse than that is known to be


class Complaints:
    """Of one fetch."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, type[Exception]], str] = {}
        self._more: dict[tuple[str, type[Exception]], int] = {}

    def about(self, source: Source, error: Exception) -> None:
        """`error`: what reading from it has raised."""
        key = (str(source), type(error))
        if key in self._first:
            self._more[key] = self._more.get(key, 0) + 1
        elif isinstance(error, Altered | Denied | Untrusted) and len(self._first) < _KEPT:
            self._first[key] = str(error)

    @property
    def texts(self) -> list[str]:
        """The first of each source and kind, in words, with how often it came again."""
        return [f"{text} ({self._more[key]} more of it)" if key in self._more else text for key, text in self._first.items()]
