"""Runs of pages: where the memory of a snapshot belongs, as its index says, and the same with its bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096


class PageRun(ctypes.Structure):
    """Pages of one process (its pid in the image) that follow each other, without their bytes: `length` of those belong at `address`.

    An index of pages (pages.index) is one after the other, in the order of the chunks' bytes; page_fill.c reads them as they lie there.
    """

    _fields_ = (("pid", ctypes.c_uint64), ("address", ctypes.c_uint64), ("length", ctypes.c_uint64))


@dataclass(frozen=True)
class Pages:
    """A run of pages with its bytes."""

    pid: int
    address: int
    data: memoryview

    @property
    def length(self) -> int:
        return len(self.data)


def write_index(path: Path, runs: Iterable[PageRun]) -> None:
    """`runs`: in the order of the chunks' bytes."""
    path.write_bytes(b"".join(map(bytes, runs)))


def read_index(data: bytes) -> ctypes.Array[PageRun]:
    return (PageRun * (len(data) // ctypes.sizeof(PageRun))).from_buffer_copy(data)


def address_of(memory: memoryview) -> int:
    """Of writable memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
