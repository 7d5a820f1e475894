"""Where the server finds the bytes of a region that it fills: chunks in files, which travel to it as descriptors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zerowake_proto import gpumem_pb2 as pb


class Source(NamedTuple):
    """Chunks that lie one behind the other in a file."""

    path: Path
    offset: int  # bytes, of the first of them in the file
    first_chunk: int
    chunks: int


def fill_request(
    layout: pb.Layout | bytes, sources: Sequence[Source], device: str, pinned: bool, *, spare: bool = False
) -> tuple[pb.Request, list[int]]:
    """A request to fill, and the descriptors of its files, which the caller closes. Raises OSError: a file cannot be opened."""
    serialized = layout if isinstance(layout, bytes) else layout.SerializeToString(deterministic=True)
    fill = pb.Fill(layout=serialized, device=device, pinned=pinned, spare=spare)
    files: list[int] = []
    numbers: dict[Path, int] = {}
    try:
        for path, offset, first, count in sources:
            if path not in numbers:
                files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                numbers[path] = len(files) - 1
            fill.sources.add(first_chunk=first, chunks=count, offset=offset, file=numbers[path])
    except BaseException:
        close_files(files)
        raise
    return pb.Request(fill=fill), files


def close_files(files: list[int]) -> None:
    for fd in files:
        os.close(fd)
