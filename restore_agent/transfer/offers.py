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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.layout import chunk_key, manifest_key, signature_key
from restore_agent.transfer.source import Absent, Denied, Unreachable

Bytes: TypeAlias = "memoryview | Path"  # in memory, or a file
Find = Callable[[Chunk], "Bytes | None"]


@dataclass(frozen=True)
class Offered:
    """One snapshot as it is offered. `small`: manifest and signature, by key. `find`: where a chunk is on this node; None: nowhere yet."""

    namespace: str
    digest: str
    small: Mapping[str, bytes]
    chunks: Mapping[str, Chunk]  # by key
    find: Find
    _arrivals: threading.Condition = field(default_factory=threading.Condition)

    @classmethod
    def of(cls, namespace: str, digest: str, manifest: bytes, signature: bytes, chunks: Iterable[Chunk], find: Find) -> Offered:
        small = {manifest_key(digest): manifest, signature_key(digest): signature}
        return cls(namespace, digest, small, {chunk_key(chunk.hash): chunk for chunk in chunks}, find)

    def arrived(self) -> None:
        """Another chunk is here: whoever waits looks again. From any thread."""
        with self._arrivals:
            self._arrivals.notify_all()

    def get(self, key: str, seconds: float) -> Bytes:
        """What is behind a key of the snapshot; it may be waited for so long.

        Raises:
            Absent: it is not here. Unreachable: nor has it come meanwhile.
            Denied: it is no part of the snapshot.
        """
        if key in self.small:
            return memoryview(self.small[key])
        chunk = self.chunks.get(key)
        if chunk is None:
            raise Denied(f"snapshot {self.digest[:12]} of namespace {self.namespace} has no {key}")
        with self._arrivals:
            if not self._arrivals.wait_for(lambda: self.find(chunk) is not None, seconds):
                kind = Unreachable if seconds else Absent
                raise kind(f"{key} of snapshot {self.digest[:12]} has not come to this node yet")
        found = self.find(chunk)
        if found is None:
            raise Absent(f"{key} of snapshot {self.digest[:12]} is not on this node any more")
        return found


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
            offered.arrived()

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
