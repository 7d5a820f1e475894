"""The chunk store: pages by content. A chunk is a file named by the BLAKE3 of its bytes; what two snapshots share is stored once.

A chunk ends at 4 MiB, or at a 4 MiB boundary of the address space once it holds 1 MiB: so two images that differ in one place fall back
into step at the next boundary that finds both with a chunk of 1 MiB or more. Files are written under a temporary name, synced and renamed:
one that is there is whole.

Chunks that no manifest names are removed (`collect`), at any time: another snapshot is published or removed meanwhile. Whoever writes or
reads holds a `Lease` on its chunks, and those stay. Leases are memory of the one process that owns the store, so whatever ends it, none is
left over. Rejected: lease files on disk, which would need an owner that is known to be dead before they may be ignored.

Rejected, as measured (two cores, 229 MB chat engine, a disk of 3 GB/s): one file of pages for each snapshot (reads of 4 MiB files by 16
readers are as fast, and would share nothing), and storing equal pages once (2 % of that image, none of the embeddings engine's).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from gpumem.filler.files import File
from gpumem.wire.errors import Corrupt
from restore_agent.errors import AgentError
from restore_agent.snapshots.page_runs import PAGE, PageRun, Pages, address_of
from zerowake_shared import durable

CHUNK = 4 << 20  # bytes at most
_SMALLEST = 1 << 20  # a boundary of the address space ends no smaller one
_WRITERS = 4  # hashing and fsync overlap


class CorruptChunk(AgentError):
    """A chunk is missing or has other bytes than its name says."""

    reason = "corrupt"


@dataclass(frozen=True)
class Chunk:
    """The name of some bytes."""

    hash: str  # BLAKE3, hex
    size: int  # bytes


class Lease:
    """Chunks, and folders by their names, that no sweep removes while it is held. Any number of threads may use one."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._held: set[str] = set()

    def hold(self, hashes: Iterable[str]) -> None:
        """These too, from now on; whether they are there is another question."""
        with self._store.lock:
            fresh = set(hashes) - self._held
            self._held |= fresh
            self._store.leased.update(fresh)

    def put(self, data: bytes | bytearray) -> Chunk:
        """Stores bytes. Raises OSError (no space, say) and leaves nothing half-written."""
        chunk = Chunk(blake3(data).hexdigest(), len(data))
        self.hold([chunk.hash])  # before looking for it: one that is there may be about to go
        self._store.write(chunk, data)
        return chunk

    def release(self) -> None:
        """Twice does nothing."""
        with self._store.lock:
            self._store.leased.subtract(self._held)
            self._store.leased += Counter()  # drops those that nobody holds
            self._held.clear()


class ChunkStore:
    """A folder of chunks. Its calls block on the disk; any number of threads may make them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.lock = threading.Lock()  # over `leased`, and over each removal
        self.leased: Counter[str] = Counter()  # hash → leases that hold it

    def path(self, chunk_hash: str) -> Path:
        return self._directory / chunk_hash[:2] / chunk_hash

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """Held until the block ends."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            lease.release()

    def has(self, chunk: Chunk) -> bool:
        """Whether a file of that name and size is there."""
        with contextlib.suppress(FileNotFoundError):
            return self.path(chunk.hash).stat().st_size == chunk.size
        return False

    def write(self, chunk: Chunk, data: bytes | bytearray | memoryview) -> None:
        """For `Lease.put`: a chunk that nobody holds may be removed as it is written. One that is there and has come to be of other content
        is written anew: whoever takes a damaged snapshot again would otherwise have the same damage in the new one."""
        if self._is_whole(chunk):
            return
        path = self.path(chunk.hash)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{chunk.hash}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def _is_whole(self, chunk: Chunk) -> bool:
        if not self.has(chunk):
            return False
        try:
            self.read_into(chunk, memoryview(bytearray(chunk.size)))
        except (CorruptChunk, OSError):  # what cannot be read is not there for anybody else either
            return False
        return True

    def sync(self, hashes: Iterable[str]) -> None:
        """Chunks that were written are there after a crash of the machine, too. Raises OSError."""
        for folder in {self.path(each).parent for each in hashes}:
            with contextlib.suppress(FileNotFoundError):  # whoever names it looks whether it is there
                durable.sync_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            durable.sync_folder(self._directory)

    def read_into(self, chunk: Chunk, target: memoryview) -> None:
        """Reads and verifies one chunk.

        Raises:
            CorruptChunk: missing, torn, or of other content.
        """
        path = self.path(chunk.hash)
        try:
            file = File.of(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise CorruptChunk(f"chunk {chunk.hash} is missing from {path.parent}") from None
        with contextlib.closing(file):
            whole = os.fstat(file.fd).st_size == chunk.size == len(target)
            if whole:
                aligned = address_of(target) % PAGE == chunk.size % PAGE == 0
                try:
                    file.read(0, target, target if aligned else None)
                except Corrupt:  # somebody makes it shorter as it is read
                    whole = False
        if not whole or blake3(target).hexdigest() != chunk.hash:
            raise CorruptChunk(f"{path} does not have the content that its name says; delete it and take the snapshot again")

    def collect(self, *used: Container[str]) -> bool:
        """Removes every chunk that is neither used nor leased, and what a crash left. False: some that nobody uses are leased."""
        done = True
        for folder in self._directory.glob("*/"):
            left: Iterable[str] = os.listdir(folder)  # noqa: PTH208  (of many thousands: a Path takes longer to make than all the rest)
            for each in used:
                left = itertools.filterfalse(each.__contains__, left)
            for name in left:
                with self.lock:
                    if name.partition(".")[0] in self.leased:  # a chunk, or one that is being written
                        done = False
                    else:
                        (folder / name).unlink(missing_ok=True)  # what was being written has another name by now
        return done


def write_chunks(lease: Lease, runs: Iterable[Pages]) -> tuple[list[Chunk], list[PageRun]]:
    """Stores the pages of all runs. Returns the chunks in order, and the index of their pages in that order.

    Raises:
        OSError: no space; chunks already written stay until the next `collect` after the lease.
    """
    index: list[PageRun] = []
    chunks: list[Future[Chunk]] = []
    current = bytearray()
    with ThreadPoolExecutor(_WRITERS, "chunks") as pool:

        def end_chunk() -> None:
            nonlocal current
            # A few in flight are enough, and keep a 40 GiB image from being held in memory.
            if len(chunks) >= 2 * _WRITERS:
                chunks[-2 * _WRITERS].result()
            chunks.append(pool.submit(lease.put, current))
            current = bytearray()

        for run in runs:
            index.append(PageRun(run.pid, run.address, run.length))
            done = 0
            while done < run.length:
                boundary = CHUNK - (run.address + done) % CHUNK
                n = min(run.length - done, CHUNK - len(current), boundary)
                current += run.data[done : done + n]
                done += n
                if len(current) == CHUNK or (n == boundary and len(current) >= _SMALLEST):
                    end_chunk()
        if current:
            end_chunk()
        return [chunk.result() for chunk in chunks], index
