"""The snapshots on this node's disk.

    chunks/ab/<hash>                       pages, by content (chunks.py)
    snapshots/<digest>/manifest.json       and signature.json, pages.index, images/ (CRIU's skeleton), weights/ (layouts), and what the
                                           engine had changed in its file system (changes.tar; of a container container.json, too);
                                           checkpoints/: weights that an engine published in its container, which gpumem verifies
    names/<namespace>/<name>               a link to ../../snapshots/<digest>
    fetched/<region>/                      files of a region that came from elsewhere, under their names in the model's folder
    keys/                                  whose signatures count (keyring.py)
    node/                                  what this node found out of its own files; it may be lost
    unfit/                                 a store of what snapshots that do not fit this node have for cold starts (unfit.py)
    arriving/                              snapshots that are on their way here (arrivals.py)
    tmp/                                   what is being made; emptied at start
    lock

A snapshot is published by renaming its finished folder into place and then its link over the old one: there is no moment without one or
the other, and a crash leaves at most a folder without a name, which the next start removes. Its manifest is signed (catalog.py).

What no name needs is removed (a sweep), by any publication or removal, while others write and read. Whoever does holds a lease
(chunks.py): on the chunks of a draft from before they are written until its name stands, on a snapshot's folder and chunks while they are
read. A sweep leaves what is leased to the next one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from blake3 import blake3

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.snapshots.arrivals import Arrivals
from restore_agent.snapshots.catalog import FETCHED, MANIFEST, Catalog, Corrupt, NotFound, Snapshot, decoded
from restore_agent.snapshots.chunks import Chunk, Lease
from restore_agent.snapshots.disk_usage import bytes_below
from restore_agent.snapshots.file_hashes import FileHashes
from restore_agent.snapshots.keyring import SIGNATURE, Keyring, Signature, UnusableKey
from restore_agent.snapshots.managed import Managed
from restore_agent.snapshots.manifest import FileRecord, Manifest, digest_of
from restore_agent.snapshots.origins import Origins
from restore_agent.snapshots.pins import Pins
from restore_agent.snapshots.references import References
from restore_agent.snapshots.uses import Uses
from zerowake_shared import durable
from zerowake_shared.discard import discard
from zerowake_shared.state_folder import STORE_LOCK, Lock, store_holder


class NameTaken(AgentError):
    """A snapshot of that name exists."""

    kind = ErrorKind.EXISTS
    reason = "exists"


class StoreBusy(AgentError):
    """Another agent holds this state folder."""


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
        try:
            self._take_stock(state, keys)
        except BaseException:  # else this very process would be in its way
            self._lock.close()
            raise

    def _take_stock(self, state: Path, keys: Path | None) -> None:
        shutil.rmtree(state / "tmp", ignore_errors=True)
        for folder in ("tmp", "snapshots", "names"):
            (state / folder).mkdir(exist_ok=True)
        super().__init__(state, keys)
        if self.keyring.is_empty():
            self.keyring.make()
        self.arrivals = Arrivals(state)
        self.hashes = FileHashes(state / "node" / "files.json")
        self.uses = Uses(state / "node" / "uses")
        self.origins = Origins(state)
        self.pins = Pins(state)
        self.managed = Managed(state)
        self._references = References(state, self._manifest)
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
        """Folder, chunks and weights that came from elsewhere stay until the block ends, also where another removes or replaces the
        snapshot meanwhile. Does not block."""
        with self.chunks.lease() as lease:
            regions = (record.region for record in snapshot.manifest.weights)
            lease.hold([snapshot.digest, *regions, *(chunk.hash for chunk in snapshot.chunks)])
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

    def adopt(
        self, workspace: Path, data: bytes, signature: Signature, lease: Lease, *, replace: bool, only: Collection[str] | None = None
    ) -> Snapshot:
        """The same for a manifest that came from elsewhere with its signature; its files and chunks were verified as they came. `only`:
        of a store that keeps no more of it than these files (unfit.py).

        Raises what `publish` does, and Untrusted: the signature does not count here; nothing has changed.
        """
        self.keyring.verify(data, signature)
        manifest = decoded(self.state / "snapshots" / digest_of(data), data).manifest
        snapshot = self._name(workspace, manifest, data, signature, lease, replace=replace, only=only)
        self.arrivals.ended(snapshot.digest)
        return snapshot

    def has_name(self, namespace: str, name: str) -> bool:
        """Whether a snapshot of that name is here, whole or not."""
        return self.link(namespace, name).is_symlink()

    def _name(
        self,
        workspace: Path,
        manifest: Manifest,
        data: bytes,
        signature: Signature,
        lease: Lease,
        *,
        replace: bool,
        only: Collection[str] | None = None,
    ) -> Snapshot:
        hashes = [chunk.hash for chunk in manifest.chunks] if only is None else []
        lease.hold(hashes)
        durable.sync_tree(workspace)
        self.chunks.sync(hashes)
        with self._changing:
            snapshot = self._publish(workspace, manifest, data, signature, replace=replace, only=only)
            self._sweep()
        return snapshot

    def _publish(
        self, workspace: Path, manifest: Manifest, data: bytes, signature: Signature, *, replace: bool, only: Collection[str] | None
    ) -> Snapshot:
        link = self.link(manifest.namespace, manifest.name)
        if link.is_symlink() and not replace:
            raise NameTaken(f"snapshot {manifest.namespace}/{manifest.name} exists already")
        self._check_whole(workspace, manifest, only)
        durable.write(workspace / MANIFEST, data)
        durable.write(workspace / SIGNATURE, signature.encode())
        durable.sync_folder(workspace)
        directory = self.state / "snapshots" / digest_of(data)
        if directory.exists():
            _mend(directory, workspace)
        else:
            workspace.replace(directory)
            durable.sync_folder(directory.parent)
        link.parent.mkdir(exist_ok=True)
        durable.sync_folder(link.parent.parent)
        fresh = self.state / "tmp" / secrets.token_hex(8)
        fresh.symlink_to(Path("../../snapshots") / directory.name)
        try:
            fresh.replace(link)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        durable.sync_folder(link.parent)
        return Snapshot(directory.name, manifest, directory)

    def _check_whole(self, workspace: Path, manifest: Manifest, only: Collection[str] | None) -> None:
        pages, files = manifest.chunks if only is None else (), manifest.files if only is None else only
        missing = [str(chunk.hash) for chunk in pages if not self.chunks.has(Chunk(chunk.hash, chunk.size))]
        missing += [name for name in files if not _has_size(workspace / name, manifest.files[name].size)]
        if missing:
            raise Corrupt(
                f"snapshot {manifest.namespace}/{manifest.name} is not published: {missing[0]} and {len(missing) - 1} more of its files "
                f"were removed from {self.state} while it was taken; let nobody else write there, and take it again"
            )

    def removable_bytes(self) -> tuple[dict[str, int], dict[frozenset[str], int]]:
        """Digest of each named snapshot → bytes that are free once it is removed, and nobody reads it any more; and bytes that are
        free once several are, by the digests of all of them. Empty where a manifest is corrupt: then every chunk stays.
        """
        with self._changing:
            try:
                chunks, regions = self._look()
            except Corrupt:
                return {}, {}
            kept = chunks | set(self.chunks.leased)
            alone, shared = self._references.chunk_bytes(kept)
            users: defaultdict[str, set[str]] = defaultdict(set)
            for digest in alone:
                for region in self._references.regions_of(digest) - regions - self.chunks.leased.keys():
                    users[region].add(digest)
        for region, digests in users.items():
            size = bytes_below(self.state / FETCHED / region)
            if len(digests) == 1:
                alone[min(digests)] += size
            elif size:
                shared[frozenset(digests)] = shared.get(frozenset(digests), 0) + size
        return {digest: size + bytes_below(self.state / "snapshots" / digest) for digest, size in alone.items()}, shared

    def remove(self, namespace: str, name: str, digest: str = "") -> None:
        """Removes the name, and every file that no other name needs; with `digest`, only if it stands for that one. Raises NotFound."""
        link = self.taken(namespace, name)
        with self._changing:
            found = link.readlink().name if link.is_symlink() else ""  # another was sooner
            if digest and found != digest:
                raise NotFound(f"snapshot {namespace}/{name} on this node is {digest[:12]} no more")
            if found:
                self.origins.forget(found)
                self.pins.put(found, None)
                self.managed.remove(found)
                link.unlink()
            durable.sync_folder(link.parent)  # before anything goes: the name must not come back without it
            with contextlib.suppress(OSError):  # the namespace has others
                link.parent.rmdir()
            self._sweep()

    def sweep(self) -> None:
        """Removes folders without a name, and chunks that no manifest names, unless they are leased."""
        with self._changing:
            self._sweep()

    def _sweep(self) -> None:
        """A corrupt manifest keeps every chunk where it is, until it is whole again or gone."""
        self.postponed = False
        try:
            chunks, regions = self._look()
        except Corrupt:
            self.postponed = True
            return
        for folder in (self.state / FETCHED).glob("*"):
            region = folder.name.partition(".")[0]
            if region not in regions and region not in self._references.regions:
                self._remove_folder(folder, region)
        if not self.chunks.collect(self._references.chunks, chunks):
            self.postponed = True

    def _look(self) -> tuple[set[str], set[str]]:
        """At what names stand for, with what is on its way, whose chunks and regions are returned. Folders without a name are removed.

        Raises Corrupt: it is not known what a snapshot needs."""
        named = {os.readlink(link).rpartition("/")[2] for link in self.names()}  # noqa: PTH115
        kept = self.arrivals.kept(self.chunks.leased, named, self._remove_folder)
        there = set(os.listdir(self.state / "snapshots"))  # noqa: PTH208  (of thousands, a Path takes longer than the rest)
        for digest in there - named:
            self._remove_folder(self.state / "snapshots" / digest, digest)
        self._references.look(there & named)
        return kept

    def _manifest(self, digest: str) -> Manifest:
        """Whoever signed it: what is not trusted today may be so tomorrow, and may be signed again. Raises Corrupt."""
        folder = self.state / "snapshots" / digest
        return decoded(folder, self.manifest_of(folder)).manifest

    def _remove_folder(self, directory: Path, leased: str) -> None:
        """Out of sight in one step, unless somebody holds it by that name: nobody sees a half of it."""
        gone = self.state / "tmp" / secrets.token_hex(8)
        with self.chunks.lock:
            if leased in self.chunks.leased:
                self.postponed = True
                return
            try:
                directory.rename(gone)
            except FileNotFoundError:
                return
        discard(gone)


def _has_size(path: Path, size: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size == size
    return False


def _mend(directory: Path, workspace: Path) -> None:
    """The same snapshot came once more: each file takes the place of its twin, which others may be reading."""
    for path in [path for path in workspace.rglob("*") if path.is_file()]:
        target = directory / path.relative_to(workspace)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    durable.sync_tree(directory)
    discard(workspace)


def record_file(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(size=len(data), hash=blake3(data).hexdigest())
