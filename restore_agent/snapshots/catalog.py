"""The snapshots on this node's disk, as anybody may read them. Where each file lies, and how one is published, store.py says.

A snapshot's manifest is signed: one that was edited by hand, or comes from a node that is not trusted, is refused before another byte of it
is read, and through it every byte that it names.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.snapshots.chunks import Chunk, ChunkStore, CorruptChunk
from restore_agent.snapshots.keyring import SIGNATURE, Keyring, Signature, Untrusted
from restore_agent.snapshots.manifest import (
    FileRecord,
    InvalidManifest,
    Manifest,
    WeightsRecord,
    WeightsRegion,
    check_name,
    digest_of,
    layout_file,
)
from restore_agent.snapshots.unusable import Unusable
from zerowake_shared import durable

MANIFEST = "manifest.json"
FETCHED = "fetched"
_SEAL = "seal"  # what versions before 4 had instead of a signature
Identity = tuple[int, int, int]
_DIGEST = re.compile(r"[0-9a-f]{64}")


class NotFound(AgentError):
    """No snapshot of that name or digest in that namespace."""

    kind = ErrorKind.NOT_FOUND
    reason = "not-found"


class Corrupt(Unusable):
    """A snapshot's bytes are not those that were published."""

    reason = "corrupt"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on this disk, or a draft of one."""

    digest: str
    manifest: Manifest
    directory: Path

    @property
    def chunks(self) -> list[Chunk]:
        return [Chunk(chunk.hash, chunk.size) for chunk in self.manifest.chunks]

    def __str__(self) -> str:
        return f"{self.manifest.namespace}/{self.manifest.name}@{self.digest[:12]}"


@dataclass(frozen=True)
class Unreadable:
    """A name on this disk behind which no whole snapshot is."""

    namespace: str
    name: str
    why: Unusable


class Catalog:
    """The store as anybody may read it, also beside the agent that owns it. Its calls block on the disk: use them in threads."""

    def __init__(self, state: Path, keys: Path | None = None) -> None:
        """`keys`: the folder of the keyring; None: the state folder's own."""
        self.state = state
        self.chunks = ChunkStore(state / "chunks")
        self.keyring = Keyring(keys_of(state, keys))
        self._seen: dict[tuple[str, str], tuple[object, Snapshot]] = {}  # by name: as what it was verified, and what it was

    def list(self) -> list[Snapshot | Unreadable]:
        """Every named snapshot, and every name of none. Of thousands, only those are read that are not as they were at the last look."""
        found: list[Snapshot | Unreadable] = []
        names, keys = sorted((link.parent.name, link.name) for link in self.names()), self.keyring.identity
        for name in names:
            try:
                found.append(self.again(*name, keys))
            except NotFound:
                continue  # it was removed since it was seen
            except Unusable as error:
                found.append(Unreadable(*name, error))
        for gone in self._seen.keys() - set(names):
            self._seen.pop(gone, None)
        return found

    def head(self, namespace: str, name: str, keys: object) -> tuple[object, ...]:
        """Of what a name stands for: its digest, and which manifest, signature and keys it counts by. As long as these are the same,
        nothing of it has to be verified again. `keys`: the keyring's identity. Raises NotFound.
        """
        digest = self.named(namespace, name)
        if not digest:
            raise NotFound(f"no snapshot {namespace}/{name} on this node")
        folder = f"{self.state}/snapshots/{digest}"
        return digest, identity(f"{folder}/{MANIFEST}"), identity(f"{folder}/{SIGNATURE}"), keys

    def again(self, namespace: str, name: str, keys: object) -> Snapshot:
        """As `get`, but what was verified before and has not been written to since is not read again. `keys`: the keyring's identity."""
        now = self.head(namespace, name, keys)
        seen = self._seen.get((namespace, name))
        if seen is None or seen[0] != now:
            seen = self._seen[namespace, name] = now, self.get(namespace, name)
        return seen[1]

    def get(self, namespace: str, name: str, digest: str = "") -> Snapshot:
        """The snapshot of that name; with `digest`, only if it is that one. Raises NotFound, Corrupt, Untrusted, InvalidName."""
        check_name("namespace", namespace)
        check_name("name", name)
        while True:
            found = self.named(namespace, name)
            if not found:
                raise NotFound(f"no snapshot {namespace}/{name} on this node")
            directory = self.state / "snapshots" / found
            if digest and directory.name != digest:
                raise NotFound(f"snapshot {namespace}/{name} on this node is {directory.name[:12]}, not {digest[:12]}")
            try:
                snapshot = self._open(directory)
                if (snapshot.manifest.namespace, snapshot.manifest.name) != (namespace, name):
                    raise Corrupt(f"snapshot {namespace}/{name}: what is there under its name is {snapshot}; take the snapshot again")
                return snapshot
            except Unusable:
                if self.named(namespace, name) == found:
                    raise  # else it was replaced or removed as it was read

    def of_digest(self, digest: str) -> Snapshot:
        """The snapshot with that digest, whatever its name is. Raises NotFound, Corrupt, Untrusted."""
        directory = self.state / "snapshots" / digest
        if not _DIGEST.fullmatch(digest) or not directory.is_dir():  # others name it, who may name what is no digest
            raise NotFound(f"no snapshot {digest[:12]} on this node")
        return self._open(directory)

    def verify(self, snapshot: Snapshot, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Reads and hashes every file and chunk; `told` hears how many bytes of chunks are read, of how many.

        Raises Corrupt with the first that is wrong, NotFound: it was removed meanwhile.
        """
        for name, record in snapshot.manifest.files.items():
            self.read_file(snapshot, name, record)
        buffer = bytearray(max((chunk.size for chunk in snapshot.chunks), default=0))
        done, total = 0, sum(chunk.size for chunk in snapshot.chunks)
        for chunk in snapshot.chunks:
            self.read_chunk(snapshot, chunk, memoryview(buffer)[: chunk.size])
            done += chunk.size
            told(done, total)

    def fault(self, snapshot: Snapshot, why: str) -> AgentError:
        """What to raise where something of a snapshot is missing or wrong: whoever removes one takes its folder first."""
        if not snapshot.directory.exists():
            return NotFound(f"snapshot {snapshot} was removed or replaced meanwhile")
        return Corrupt(f"snapshot {snapshot}: {why}")

    def read_file(self, snapshot: Snapshot, name: str, record: FileRecord) -> bytes:
        """One small file of a snapshot, verified. Raises Corrupt, NotFound: it was removed meanwhile."""
        path = snapshot.directory / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise self.fault(snapshot, f"{path} is missing; take the snapshot again") from None
        if len(data) != record.size or blake3(data).hexdigest() != record.hash:
            raise Corrupt(f"snapshot {snapshot}: {path} has changed since it was published; take the snapshot again")
        return data

    def read_chunk(self, snapshot: Snapshot, chunk: Chunk, target: memoryview) -> None:
        """One of a snapshot's chunks, verified. Raises Corrupt, NotFound: it was removed meanwhile."""
        try:
            self.chunks.read_into(chunk, target)
        except CorruptChunk as error:
            raise self.fault(snapshot, str(error)) from None

    def regions(self, snapshot: Snapshot) -> Sequence[WeightsRegion]:
        """Of a snapshot's weights, and where they are on this node. Raises Corrupt, NotFound: it was removed meanwhile."""
        files = [(record, layout_file(record)) for record in snapshot.manifest.weights]
        return [
            WeightsRegion(record, self.read_file(snapshot, name, snapshot.manifest.files[name]), self._folder_of(snapshot, record))
            for record, name in files
        ]

    def fetched_weights(self, record: WeightsRecord) -> Path:
        """Where this node puts the files of a region that came from elsewhere."""
        return self.state / FETCHED / record.region

    def _folder_of(self, snapshot: Snapshot, record: WeightsRecord) -> Path:
        if not record.folder:
            return snapshot.directory
        fetched = self.fetched_weights(record)
        return fetched if all((fetched / part.path).is_file() for part in record.parts) else Path(record.folder)

    def signature(self, snapshot: Snapshot) -> Signature:
        """Raises Untrusted: it has none that could be read."""
        return Signature.decode(durable.content(snapshot.directory / SIGNATURE))

    def sign(self, namespace: str, name: str, told: Callable[[int, int], None] = lambda done, total: None) -> Snapshot:
        """Signs a snapshot by this node's key, whoever signed it before: all that it names has to be whole. `told`: as of `verify`.

        Raises:
            NoSigningKey, NotFound, InvalidName.
            Corrupt: its bytes are others than it names.
        """
        self.keyring.check_signs()
        directory = self.state / "snapshots" / self.taken(namespace, name).readlink().name
        data = self.manifest_of(directory)
        snapshot = decoded(directory, data)
        self.verify(snapshot, told)
        durable.replace(directory / SIGNATURE, self.keyring.sign(data).encode())
        return snapshot

    def _open(self, directory: Path) -> Snapshot:
        data = self.manifest_of(directory)
        try:
            self.keyring.verify(data, Signature.decode(durable.content(directory / SIGNATURE)))
        except Untrusted as error:
            also = ", or" if ";" in str(error) else ";"
            raise Untrusted(f"snapshot {directory.name[:12]}: {error}{also} take the snapshot again") from None
        return decoded(directory, data)

    def manifest_of(self, directory: Path) -> bytes:
        """As it was published, by whomever. Raises Corrupt."""
        data = durable.content(directory / MANIFEST)
        if data is None:
            raise Corrupt(f"snapshot {directory.name[:12]}: {directory / MANIFEST} is missing; take the snapshot again")
        if digest_of(data) != directory.name:
            raise Corrupt(f"snapshot {directory.name[:12]}: its manifest was changed after it was published; take the snapshot again")
        if (directory / _SEAL).exists():
            raise Corrupt(f"snapshot {directory.name[:12]}: it was taken by an older zerowake, which did not sign; take the snapshot again")
        return data

    def names(self) -> Iterator[Path]:
        """Every name's link. A namespace's folder goes with its last name, while others look."""
        for folder in (self.state / "names").iterdir() if (self.state / "names").exists() else ():
            with contextlib.suppress(FileNotFoundError):
                yield from list(folder.iterdir())

    def named(self, namespace: str, name: str) -> str:
        """The digest that the name stands for, whole or not; empty: none. So short a look that whoever serves may take it himself."""
        try:
            return self.link(namespace, name).readlink().name
        except OSError:
            return ""

    def stands(self, snapshot: Snapshot) -> bool:
        """Whether its name stands for it still: it was neither removed nor replaced. As short a look."""
        return self.named(snapshot.manifest.namespace, snapshot.manifest.name) == snapshot.digest

    def link(self, namespace: str, name: str) -> Path:
        return self.state / "names" / namespace / name

    def taken(self, namespace: str, name: str) -> Path:
        """The link of a name that a snapshot has, whole or not. Raises NotFound, InvalidName."""
        link = self.link(check_name("namespace", namespace), check_name("name", name))
        if not link.is_symlink():
            raise NotFound(f"no snapshot {namespace}/{name} on this node")
        return link


def identity(path: Path | str) -> Identity | None:
    """Another one where a file is another one or was written to, which nobody can undo; None: there is none."""
    try:
        stat = os.stat(path)  # noqa: PTH116  (thousands are looked at: a Path takes longer to make than its file to look at)
    except OSError:
        return None
    return stat.st_ino, stat.st_ctime_ns, stat.st_size


def keys_of(state: Path, keys: Path | None) -> Path:
    """The folder of the keyring: the one that was named, else the state folder's own."""
    return keys or state / "keys"


def decoded(directory: Path, data: bytes) -> Snapshot:
    """What a folder's manifest says. Raises Corrupt."""
    try:
        return Snapshot(directory.name, Manifest.decode(data), directory)
    except InvalidManifest as error:
        raise Corrupt(f"snapshot {directory.name[:12]}: {error}; take the snapshot again") from None
