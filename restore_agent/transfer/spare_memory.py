"""Memory that pieces lie in on their way, used again and again: new memory costs the kernel as much time as what is done with it.

Whoever takes some gives it back when its reader has asked for the next piece, or has gone. Not where a call was given up in the middle: its
thread may still write there, and nobody gets that memory again.
"""

from __future__ import annotations

import mmap

PIECE = (4 << 20) + (64 << 10)  # bytes; a chunk, and one that was encrypted, come in one


class SpareMemory:
    """Of one size, on pages' boundaries; for one event loop."""

    def __init__(self, size: int) -> None:
        """`size`: bytes of each."""
        self._size = size
        self._spare: list[memoryview] = []

    def take(self) -> memoryview:
        """Nobody else has it. What is in it is anything."""
        return self._spare.pop() if self._spare else memoryview(mmap.mmap(-1, self._size))

    def give(self, memory: memoryview) -> None:
        """It was taken here, and nobody uses it any more."""
        self._spare.append(memory)
