"""How far a transfer is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes: those that are where they shall be, how many had to be moved for that, and all."""

    done: int
    moved: int
    total: int
