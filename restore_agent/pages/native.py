"""page_fill.c, typed: the loops over pages that Python would be too slow for. They let go of Python's lock."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import zerowake_native

from restore_agent.snapshots.page_runs import PAGE, PageRun, address_of

_SIZES = ctypes.POINTER(ctypes.c_size_t)


class Piece(ctypes.Structure):
    """What one thread copies at a time."""

    _fields_ = (("pid", ctypes.c_uint64), ("address", ctypes.c_uint64), ("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Process(ctypes.Structure):
    """Which process of the host a pid in the image is."""

    _fields_ = (("pid", ctypes.c_uint64), ("host", ctypes.c_uint64))


_library = ctypes.CDLL(str(zerowake_native.PAGE_FILL), use_errno=True)
_library.page_pieces.argtypes = [ctypes.POINTER(PageRun), ctypes.c_size_t, ctypes.POINTER(ctypes.c_uint64), _SIZES, ctypes.POINTER(Piece)]
_library.page_pieces.restype = ctypes.c_size_t
_library.page_fill.argtypes = [
    ctypes.c_void_p,
    ctypes.POINTER(Piece),
    ctypes.c_size_t,
    ctypes.POINTER(_Process),
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int),
    ctypes.POINTER(ctypes.c_uint64),
]
_library.page_fill.restype = ctypes.c_int
_library.page_zeros.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_library.page_zeros.restype = None


def cut(runs: ctypes.Array[PageRun], ends: Sequence[int]) -> tuple[ctypes.Array[Piece], Sequence[int]]:
    """Pieces of runs, whose bytes follow each other, and how many of them lie before the end of each chunk. `ends`: where chunks end."""
    offsets, lasts = (ctypes.c_uint64 * len(ends))(*ends), (ctypes.c_size_t * len(ends))()
    count = _library.page_pieces(runs, len(runs), offsets, None, None)
    pieces = (Piece * count)()
    _library.page_pieces(runs, len(runs), offsets, lasts, pieces)
    return pieces, list(lasts)


class Filler:
    """Copies pieces into the processes of one tree. One thread may call `copy` while another calls `stop`."""

    def __init__(self, arena: int, host_pids: Mapping[int, int]) -> None:
        """`arena`: its address. `host_pids`: pid in the image → pid on this host."""
        self._arena = arena
        self._processes = (_Process * len(host_pids))(*(_Process(*pair) for pair in host_pids.items()))
        self._stop = ctypes.c_int(0)
        self._failed = ctypes.c_uint64()

    @property
    def failed_address(self) -> int:
        return self._failed.value

    @property
    def stopped(self) -> bool:
        return bool(self._stop.value)

    def copy(self, pieces: ctypes.Array[Piece], threads: int) -> int:
        """Returns 0, or an errno: then `failed_address` says where."""
        error: int = _library.page_fill(
            self._arena, pieces, len(pieces), self._processes, len(self._processes), threads, self._stop, self._failed
        )
        return error

    def stop(self) -> None:
        """A `copy` under way, or to come, ends soon with ECANCELED."""
        self._stop.value = 1


def zero_pages(memory: memoryview) -> bytes:
    """A byte for each page of writable memory: 1 where it is all zeros, else 0."""
    flags = ctypes.create_string_buffer(len(memory) // PAGE)
    _library.page_zeros(address_of(memory), len(memory) // PAGE, flags)
    return flags.raw
