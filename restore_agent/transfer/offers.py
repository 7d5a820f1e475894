"""What a node gives to other nodes: the chunks of snapshots that it trusts, each from the moment it is here.

Who asks names a namespace, the digest of a snapshot and one of its chunks. The digest is what proves that he may: nobody can guess it, and
whoever knows it got it from the manifest's signer. A chunk is given as a part of a snapshot that names it, never by its hash alone: else a
namespace could ask whether another one has certain bytes, and for them.

A snapshot that is still on its way is offered as well. Who asks for a chunk of it that has not come yet may wait for it, so that a fleet
reads each of them once from wherever they come from.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.layout import chunk_key, manifest_key, signature_key
from restore_agent.transfer.source import Absent, Denied, Unreachable


@dataclass(frozen=True, slots=True)
class InFile:
    """Bytes of a file of this node."""

    path: Path
    offset: int
    size: int


Bytes: TypeAlias = "memoryview | InFile"
Memory = Callable[[Chunk], "memoryview | None"]


class Offered:
    """One snapshot as it is offered: which chunks it has, and where those are that are here."""

    def __init__(
        self,
        namespace: str,
        digest: str,
        manifest: bytes,
        signature: bytes,
        chunks: Iterable[Chunk],
        memory: Memory = lambda chunk: None,
        *,
        all_named: bool = True,
    ) -> None:
        """`memory`: a chunk where it stands in memory, which is asked before files are. `all_named`: `chunks` are all that it has; else
        the rest is named by some of them, and comes with `name`."""
        self.namespace = namespace
        self.digest = digest
        self._small = {manifest_key(digest): memoryview(manifest), signature_key(digest): memoryview(signature)}
        self._memory = memory
        self._arrivals = threading.Condition()  # for all below
        self._chunks = {chunk_key(chunk.hash): chunk for chunk in chunks}
        self._files: dict[str, InFile] = {}  # by the chunk's hash
        self._all_named = all_named

    def name(self, chunks: Iterable[Chunk]) -> None:
        """The rest of its chunks. From any thread."""
        with self._arrivals:
            self._chunks |= {chunk_key(chunk.hash): chunk for chunk in chunks}
            self._all_named = True
            self._arrivals.notify_all()

    def arrived(self, chunk: Chunk, path: Path, offset: int = 0) -> None:
        """It is whole in this file, from that byte on; whoever waits for it gets it. From any thread."""
        with self._arrivals:
            self._files[chunk.hash] = InFile(path, offset, chunk.size)
            self._arrivals.notify_all()

    def get(self, key: str, seconds: float) -> Bytes:
        """What is behind a key of the snapshot; it may be waited for so long.

        Raises:
            Absent: it is not here. Unreachable: nor has it come meanwhile.
            Denied: it is no part of the snapshot.
        """
        if key in self._small:
            return self._small[key]
        with self._arrivals:
            self._arrivals.wait_for(lambda: self._find(key) is not None, seconds)
            found = self._find(key)
        if found is None:
            kind = Unreachable if seconds else Absent
            raise kind(f"{key} of snapshot {self.digest[:12]} has not come to this node yet")
        return found

    def _find(self, key: str) -> Bytes | None:
        """None: it may come. Raises Denied."""
        chunk = self._chunks.get(key)
        if chunk is not None:
            memory = self._memory(chunk)
            return memory if memory is not None else self._files.get(chunk.hash)
        if self._all_named:
            raise Denied(f"snapshot {self.digest[:12]} of namespace {self.namespace} has no {key}")
        return None


class Offers:
    """All that this node offers. Its calls may block on the disk, and any number of threads may make them."""

    def __init__(self, at_rest: Callable[[str], Offered | None]) -> None:
        """`at_rest`: the snapshot of a digest that is whole on this node and that it trusts."""
        self._at_rest = at_rest
        self._lock = threading.Lock()
        self._on_their_way: dict[str, Offered] = {}  # by digest

    @contextlib.contextmanager
    def on_its_way(self, offered: Offered) -> Iterator[None]:
        """A snapshot whose chunks arrive until the block ends. Its manifest was verified."""
        with self._lock:
            self._on_their_way[offered.digest] = offered
        try:
            yield
        finally:
            with self._lock:
                del self._on_their_way[offered.digest]

    def get(self, namespace: str, digest: str) -> Offered:
        """Raises Absent: this node has no such snapshot. Denied: it is another namespace's."""
        with self._lock:
            offered = self._on_their_way.get(digest)
        offered = offered or self._at_rest(digest)
        if offered is None:
            raise Absent(f"this node has no snapshot {digest[:12]}")
        if offered.namespace != namespace:
            raise Denied(f"snapshot {digest[:12]} is not of namespace {namespace}")
        return offered
