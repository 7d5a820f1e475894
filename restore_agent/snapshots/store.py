"""The snapshots on this node's disk.

    chunks/ab/<hash>                       pages, by content (chunks.py)
    snapshots/<digest>/manifest.json       and signature.json, pages.index, images/ (CRIU's skeleton), weights/ (layouts), and what the
                                           engine had changed in its file system (changes.tar; of a container container.json, too);
                                           checkpoints/: weights that an engine published in its container, which gpumem verifies
    names/<namespace>/<name>               a link to ../../snapshots/<digest>
    fetched/<region>/                      files of a region that came from elsewhere, under their names in the model's folder
    keys/                                  whose signatures count (keyring.py)
    node/                                  what this node found out of its own files; it may be lost
    arriving/                              snapshots that are on their way here (arrivals.py)
    tmp/                                   what is being made; emptied at start
    lock

A snapshot is published by renaming its finished folder into place and then its link over the old one: there is no moment without one or
the other, and a crash leaves at most a folder without a name, which the next start removes. Its manifest is signed: one that was edited
by hand, or comes from a node that is not trusted, is refused before another byte of it is read, and through it every byte that it names.

What no name needs is removed (a sweep), by any publication or removal, while others write and read. Whoever does holds a lease
(chunks.py): on the chunks of a draft from before they are written until its name stands, on a snapshot's folder and chunks while they are
read. A sweep leaves what is leased to the next one.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.snapshots import durable
from restore_agent.snapshots.arrivals import Arrivals
from restore_agent.snapshots.chunks import Chunk, ChunkStore, CorruptChunk, Lease
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.keyring import SIGNATURE, Keyring, Signature, Untrusted, UnusableKey
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
from zerowake_shared.state_folder import STORE_LOCK, Lock, store_holder

_MANIFEST = "manifest.json"
_SEAL = "seal"  # what versions before 4 had instead of a signature
_FETCHED = "fetched"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class NotFound(AgentError):
    """No snapshot of that name or digest in that namespace."""

    kind = ErrorKind.NOT_FOUND
    reason = "not-found"


class NameTaken(AgentError):
    """A snapshot of that name exists."""

    kind = ErrorKind.EXISTS
    reason = "exists"


class Corrupt(Unusable):
    """A snapshot's bytes are not those that were published."""

    reason = "corrupt"


class StoreBusy(AgentError):
    """Another agent holds this state folder."""


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
    why: Exception


class Catalog:
    """The store as anybody may read it, also beside the agent that owns it. Its calls block on the disk: use them in threads."""

    def __init__(self, state: Path, keys: Path | None = None) -> None:
        """`keys`: the folder of the keyring; None: the state folder's own."""
        self.state = state
        self.chunks = ChunkStore(state / "chunks")
        self.keyring = Keyring(keys_of(state, keys))

    def list(self) -> list[Snapshot | Unreadable]:
        """Every named snapshot, and every name of none."""
        found: list[Snapshot | Unreadable] = []
        for link in sorted(self._names()):
            try:
                found.append(self.get(link.parent.name, link.name))
            except NotFound:
                continue  # it was removed since it was seen
            except Unusable as error:
                found.append(Unreadable(link.parent.name, link.name, error))
        return found

    def get(self, namespace: str, name: str, digest: str = "") -> Snapshot:
        """The snapshot of that name; with `digest`, only if it is that one. Raises NotFound, Corrupt, Untrusted, InvalidName."""
        check_name("namespace", namespace)
        check_name("name", name)
        link = self._link(namespace, name)
        while True:
            try:
                directory = self.state / "snapshots" / link.readlink().name
            except OSError:
                raise NotFound(f"no snapshot {namespace}/{name} on this node") from None
            if digest and directory.name != digest:
                raise NotFound(f"snapshot {namespace}/{name} on this node is {directory.name[:12]}, not {digest[:12]}")
            try:
                snapshot = self._open(directory)
                if (snapshot.manifest.namespace, snapshot.manifest.name) != (namespace, name):
                    raise Corrupt(f"snapshot {namespace}/{name}: what is there under its name is {snapshot}; take the snapshot again")
                return snapshot
            except Unusable:
                if _leads_to(link, directory):
                    raise  # else it was replaced or removed as it was read

    def of_digest(self, digest: str) -> Snapshot:
        """The snapshot with that digest, whatever its name is. Raises NotFound, Corrupt, Untrusted."""
        directory = self.state / "snapshots" / digest
        if not _DIGEST.fullmatch(digest) or not directory.is_dir():  # others name it, who may name what is no digest
            raise NotFound(f"no snapshot {digest[:12]} on this node")
        return self._open(directory)

    def verify(self, snapshot: Snapshot) -> None:
        """Reads and hashes every file and chunk. Raises Corrupt with the first that is wrong, NotFound: it was removed meanwhile."""
        for name, record in snapshot.manifest.files.items():
            self.read_file(snapshot, name, record)
        buffer = bytearray(max((chunk.size for chunk in snapshot.chunks), default=0))
        for chunk in snapshot.chunks:
            try:
                self.chunks.read_into(chunk, memoryview(buffer)[: chunk.size])
            except CorruptChunk as error:
                raise self.fault(snapshot, str(error)) from None

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

    def regions(self, snapshot: Snapshot) -> Sequence[WeightsRegion]:
        """Of a snapshot's weights, and where they are on this node. Raises Corrupt, NotFound: it was removed meanwhile."""
        files = [(record, layout_file(record)) for record in snapshot.manifest.weights]
        return [
            WeightsRegion(record, self.read_file(snapshot, name, snapshot.manifest.files[name]), self._folder_of(snapshot, record))
            for record, name in files
        ]

    def fetched_weights(self, record: WeightsRecord) -> Path:
        """Where this node puts the files of a region that came from elsewhere."""
        return self.state / _FETCHED / record.region

    def _folder_of(self, snapshot: Snapshot, record: WeightsRecord) -> Path:
        if not record.folder:
            return snapshot.directory
        fetched = self.fetched_weights(record)
        return fetched if all((fetched / part.path).is_file() for part in record.parts) else Path(record.folder)

    def signature(self, snapshot: Snapshot) -> Signature:
        """Raises Untrusted: it has none that could be read."""
        return Signature.decode(durable.content(snapshot.directory / SIGNATURE))

    def sign(self, namespace: str, name: str) -> Snapshot:
        """Signs a snapshot by this node's key, whoever signed it before: all that it names has to be whole.

        Raises:
            NoSigningKey, NotFound, InvalidName.
            Corrupt: its bytes are others than it names.
        """
        self.keyring.check_signs()
        link = self._link(check_name("namespace", namespace), check_name("name", name))
        if not link.is_symlink():
            raise NotFound(f"no snapshot {namespace}/{name} on this node")
        directory = self.state / "snapshots" / link.readlink().name
        data = self._manifest(directory)
        snapshot = _decoded(directory, data)
        self.verify(snapshot)
        durable.replace(directory / SIGNATURE, self.keyring.sign(data).encode())
        return snapshot

    def _open(self, directory: Path) -> Snapshot:
        data = self._manifest(directory)
        try:
            self.keyring.verify(data, Signature.decode(durable.content(directory / SIGNATURE)))
        except Untrusted as error:
            also = ", or" if ";" in str(error) else ";"
            raise Untrusted(f"snapshot {directory.name[:12]}: {error}{also} take the snapshot again") from None
        return _decoded(directory, data)

    def _manifest(self, directory: Path) -> bytes:
        """As it was published, by whomever. Raises Corrupt."""
        data = durable.content(directory / _MANIFEST)
        if data is None:
            raise Corrupt(f"snapshot {directory.name[:12]}: {directory / _MANIFEST} is missing; take the snapshot again")
        if digest_of(data) != directory.name:
            raise Corrupt(f"snapshot {directory.name[:12]}: its manifest was changed after it was published; take the snapshot again")
        if (directory / _SEAL).exists():
            raise Corrupt(f"snapshot {directory.name[:12]}: it was taken by an older zerowake, which did not sign; take the snapshot again")
        return data

    def _names(self) -> Iterator[Path]:
        """Every name's link. A namespace's folder goes with its last name, while others look."""
        for folder in (self.state / "names").iterdir() if (self.state / "names").exists() else ():
            with contextlib.suppress(FileNotFoundError):
                yield from list(folder.iterdir())

    def _link(self, namespace: str, name: str) -> Path:
        return self.state / "names" / namespace / name


class Store(Catalog):
    """Owned by one agent at a time (`lock`)."""

    def __init__(self, state: Path, keys: Path | None = None) -> None:
        """`keys`: the folder of the keyring; None: the state folder's own, which gets a pair of its own where it has none.

        Raises:
            StoreBusy.
            UnusableKey: the folder that was named holds no key.
            OSError: the folder cannot be written.
        """
        if keys is not None and Keyring(keys).is_empty():
            raise UnusableKey(
                f"{keys} holds no key, so no snapshot would count; bring the keys there, or `zerowake key make --keys {keys}`"
            )
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._lock = Lock.take(state / STORE_LOCK)
        except BlockingIOError:
            other = store_holder(state) or "which has just ended"
            raise StoreBusy(f"{state} is in use by another zerowake agent, {other}; stop it, or give this one another --state") from None
        shutil.rmtree(state / "tmp", ignore_errors=True)
        for folder in ("tmp", "snapshots", "names"):
            (state / folder).mkdir(exist_ok=True)
        super().__init__(state, keys)
        if self.keyring.is_empty():
            self.keyring.make()
        self.arrivals = Arrivals(state)
        self.hashes = FileHashes(state / "node" / "files.json")
        self._changing = threading.Lock()  # over the moment at which names and folders do not agree
        self.postponed = False  # the last sweep left something to the next one
        self.sweep()

    def close(self) -> None:
        self._lock.close()

    def workspace(self) -> Path:
        """A new folder for something that is being made, on the store's file system."""
        path = self.state / "tmp" / secrets.token_hex(8)
        path.mkdir()
        return path

    @contextlib.contextmanager
    def hold(self, snapshot: Snapshot) -> Iterator[None]:
        """Folder and chunks stay until the block ends, also where another removes or replaces the snapshot meanwhile. Does not block."""
        with self.chunks.lease() as lease:
            lease.hold([snapshot.digest, *(chunk.hash for chunk in snapshot.chunks)])
            yield

    def publish(self, workspace: Path, manifest: Manifest, lease: Lease, *, replace: bool) -> Snapshot:
        """Makes the folder `workspace`, which holds every file of the manifest, the snapshot of its name. `lease`: on its chunks.

        Raises:
            NameTaken: and not `replace`.
            NoSigningKey: this node signs nothing; nothing has changed.
            Corrupt: not every file and chunk of the manifest is there; nothing has changed.
            OSError: no space; nothing has changed.
        """
        data = manifest.encode()
        return self._name(workspace, manifest, data, self.keyring.sign(data), lease, replace=replace)

    def adopt(self, workspace: Path, data: bytes, signature: Signature, lease: Lease, *, replace: bool) -> Snapshot:
        """The same for a manifest that came from elsewhere with its signature; its files and chunks were verified as they came.

        Raises what `publish` does, and Untrusted: the signature does not count here; nothing has changed.
        """
        self.keyring.verify(data, signature)
        try:
            manifest = Manifest.decode(data)
        except InvalidManifest as error:
            raise Corrupt(f"snapshot {digest_of(data)[:12]}: {error}; take the snapshot again") from None
        snapshot = self._name(workspace, manifest, data, signature, lease, replace=replace)
        self.arrivals.ended(snapshot.digest)
        return snapshot

    def has_name(self, namespace: str, name: str) -> bool:
        """Whether a snapshot of that name is here, whole or not."""
        return self._link(namespace, name).is_symlink()

    def _name(self, workspace: Path, manifest: Manifest, data: bytes, signature: Signature, lease: Lease, *, replace: bool) -> Snapshot:
        lease.hold(chunk.hash for chunk in manifest.chunks)
        with self._changing:
            snapshot = self._publish(workspace, manifest, data, signature, replace=replace)
            self._sweep()
        return snapshot

    def _publish(self, workspace: Path, manifest: Manifest, data: bytes, signature: Signature, *, replace: bool) -> Snapshot:
        link = self._link(manifest.namespace, manifest.name)
        if link.is_symlink() and not replace:
            raise NameTaken(f"snapshot {manifest.namespace}/{manifest.name} exists already")
        self._check_whole(workspace, manifest)
        durable.write(workspace / _MANIFEST, data)
        durable.write(workspace / SIGNATURE, signature.encode())
        durable.sync_folder(workspace)
        directory = self.state / "snapshots" / digest_of(data)
        if directory.exists():
            _mend(directory, workspace)
        else:
            workspace.replace(directory)
            durable.sync_folder(directory.parent)
        link.parent.mkdir(exist_ok=True)
        fresh = self.state / "tmp" / secrets.token_hex(8)
        fresh.symlink_to(Path("../../snapshots") / directory.name)
        fresh.replace(link)
        durable.sync_folder(link.parent)
        return Snapshot(directory.name, manifest, directory)

    def _check_whole(self, workspace: Path, manifest: Manifest) -> None:
        missing = [str(chunk.hash) for chunk in manifest.chunks if not self.chunks.has(Chunk(chunk.hash, chunk.size))]
        missing += [name for name, record in manifest.files.items() if not _has_size(workspace / name, record.size)]
        if missing:
            raise Corrupt(
                f"snapshot {manifest.namespace}/{manifest.name} is not published: {missing[0]} and {len(missing) - 1} more of its files "
                f"were removed from {self.state} while it was taken; let nobody else write there, and take it again"
            )

    def remove(self, namespace: str, name: str) -> None:
        """Removes the name, and every file that no other name needs. Raises NotFound."""
        link = self._link(check_name("namespace", namespace), check_name("name", name))
        if not link.is_symlink():
            raise NotFound(f"no snapshot {namespace}/{name} on this node")
        with self._changing:
            link.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the namespace has others
                link.parent.rmdir()
            self._sweep()

    def sweep(self) -> None:
        """Removes folders without a name, and chunks that no manifest names, unless they are leased."""
        with self._changing:
            self._sweep()

    def _sweep(self) -> None:
        """A corrupt manifest keeps every chunk where it is."""
        self.postponed = False
        named = {link.readlink().name for link in self._names()}
        used, regions = self.arrivals.kept()
        for directory in (self.state / "snapshots").iterdir():
            if directory.name not in named:
                self._remove_folder(directory)
                continue
            try:
                # Whoever signed it: what is not trusted today may be so tomorrow, and may be signed again.
                manifest = _decoded(directory, self._manifest(directory)).manifest
            except Corrupt:
                return
            used |= {chunk.hash for chunk in manifest.chunks}
            regions |= {record.region for record in manifest.weights}
        for folder in (self.state / _FETCHED).glob("*"):
            if folder.name.partition(".")[0] not in regions:
                shutil.rmtree(folder)
        if not self.chunks.collect(used):
            self.postponed = True

    def _remove_folder(self, directory: Path) -> None:
        """Out of sight in one step, unless it is leased: nobody sees a half of it."""
        gone = self.state / "tmp" / secrets.token_hex(8)
        with self.chunks.lock:
            if directory.name in self.chunks.leased:
                self.postponed = True
                return
            directory.rename(gone)
        shutil.rmtree(gone)


def keys_of(state: Path, keys: Path | None) -> Path:
    """The folder of the keyring: the one that was named, else the state folder's own."""
    return keys or state / "keys"


def _leads_to(link: Path, directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return link.readlink().name == directory.name
    return False


def _has_size(path: Path, size: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size == size
    return False


def _decoded(directory: Path, data: bytes) -> Snapshot:
    """Raises Corrupt."""
    try:
        return Snapshot(directory.name, Manifest.decode(data), directory)
    except InvalidManifest as error:
        raise Corrupt(f"snapshot {directory.name[:12]}: {error}; take the snapshot again") from None


def _mend(directory: Path, workspace: Path) -> None:
    """The same snapshot came once more: each file takes the place of its twin, which others may be reading."""
    for path in [path for path in workspace.rglob("*") if path.is_file()]:
        target = directory / path.relative_to(workspace)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(workspace)


def record_file(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(size=len(data), hash=blake3(data).hexdigest())
