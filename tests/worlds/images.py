"""Memory images as CRIU writes them, of one process that never was."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from zerowake_proto import criu_pb2

from restore_agent.pages import images
from restore_agent.snapshots.page_runs import PAGE

PID = 7  # in the image
READ, WRITE = 1, 2
ANONYMOUS = 1 << 0 | 1 << 9  # kinds of mapping, as CRIU's `status` has them
FILE_PRIVATE = 1 << 0 | 1 << 6


def scattered(size: int) -> bytes:
    """Pages of content and runs of zeros, long and short."""
    source, content = random.Random(3), bytearray()
    while len(content) < size:
        content += source.randbytes(source.choice([1, 5, 300, 900]) * PAGE)
        content += bytes(source.choice([1, 15, 16, 40, 700]) * PAGE)
    return bytes(content[:size])


def write_image(folder: Path, mappings: Mapping[int, tuple[bytes, int, int]]) -> None:
    """As CRIU does: the present pages, an entry for 256 of them at most. `mappings`: address → content, protection, kind."""
    folder.mkdir(exist_ok=True)
    vmas, entries, pages = [], [criu_pb2.PagemapHead(pages_id=1).SerializeToString()], b""
    for start, (content, protection, kind) in sorted(mappings.items()):
        vmas.append(criu_pb2.Vma(start=start, end=start + len(content), prot=protection, flags=0, status=kind))
        for at in range(0, len(content), 256 * PAGE):
            part = content[at : at + 256 * PAGE]
            entry = criu_pb2.PagemapEntry(vaddr=start + at, compat_nr_pages=len(part) // PAGE, flags=images._PRESENT)
            entries.append(entry.SerializeToString())
            pages += part
    images.write_image(folder / f"mm-{PID}.img", images._MM, [criu_pb2.Mm(vmas=vmas).SerializeToString()])
    images.write_image(folder / f"pagemap-{PID}.img", images._PAGEMAP, entries)
    (folder / "pages-1.img").write_bytes(pages)
