"""Snapshots that leave this node for a store, and come from one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakValueDictionary

from restore_agent.errors import FAILURES, AgentError, ErrorKind, reason_of
from restore_agent.sequences.awaited import Coming
from restore_agent.sequences.disk_budget import DiskBudget
from restore_agent.sequences.observer import Observer
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.manifest import Manifest, check_name
from restore_agent.snapshots.names import NameRecord, SeenNames
from restore_agent.snapshots.store import Store
from restore_agent.snapshots.unfit import Unfit
from restore_agent.transfer.bandwidth import Bandwidth
from restore_agent.transfer.collection import Collected, Collector
from restore_agent.transfer.complaints import Complaints
from restore_agent.transfer.copying import Copier
from restore_agent.transfer.exchange import Exchange, Fleet, NoPeers, OtherAgent
from restore_agent.transfer.finding import Found, manifest_of, names_in, newest_record, stands_for
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.publish import Publisher
from restore_agent.transfer.pull import Puller
from restore_agent.transfer.source import Source
from restore_agent.transfer.source_states import SourceStates
from restore_agent.transfer.store_url import opened, opened_to_write
from restore_agent.transfer.withdrawal import withdraw
from zerowake_shared.clock import SYSTEM_CLOCK

_ASKING_SECONDS = 15.0  # for what a store has, before its copy here goes
_WORTH_MEASURING = 1 << 20  # bytes: with less, the way there and back takes the most
_LOG = logging.getLogger("zerowake.agent")


class NoStore(AgentError):
    """Nobody said where from, or where to."""

    kind = ErrorKind.INVALID
    reason = "invalid"


class Travel:
    """Of one node. `changed` hears of a snapshot that has come, `observer` of its bytes, and of what did not come."""

    def __init__(self, store: Store, changed: Callable[[Snapshot], None], observer: Observer | None = None) -> None:
        self._store = store
        self._seen = SeenNames(store.state)
        self._changed = changed
        self._observer = observer
        self.arriving: dict[tuple[str, str], tuple[str, Progress]] = {}  # by name: the digest, empty where none was named
        self.remote_to_disk = Bandwidth()
        self.sources = SourceStates()
        self._pulls: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()  # by name
        self._coming: dict[tuple[str, str, str], Coming] = {}  # by name and digest
        self.begins_plain = True  # stores, where this node has no key to encrypt by
        self.exchange: Exchange | None = None  # with other agents, where there is one
        self.unfit: Unfit | None = None  # keeps what those that do not fit have for cold starts
        self.disk: DiskBudget | None = None  # makes room for what comes; None: what is free is all there is

    async def push(self, snapshot: Snapshot, url: str, progress: Callable[[Progress], None]) -> None:
        """Raises InvalidUrl, and what `Publisher.publish` does."""
        async with opened_to_write(url, self._store.keyring, begins_plain=self.begins_plain) as destination:
            with self._store.hold(snapshot):
                record = await Publisher(self._store, self._seen, destination).publish(snapshot, progress)
        await asyncio.to_thread(self._store.origins.add, snapshot.digest, [url])
        _LOG.info("snapshot %s is in %s, as number %d of its name", snapshot, destination, record.sequence)

    async def pull(
        self,
        namespace: str,
        name: str,
        digest: str,
        urls: Sequence[str],
        progress: Callable[[Progress], None],
        *,
        replace: bool,
        others: Sequence[OtherAgent] = (),
        fits: Callable[[Manifest], None] = lambda manifest: None,
        complaints: Complaints | None = None,
        urgent: bool = False,
    ) -> Snapshot:
        """From these stores, and from other agents, who serve a snapshot by its digest. One that several ask for is fetched once: the
        others wait for that. `fits`: as in Puller. `complaints`: is told of sources that did wrong; what the caller tells is no warning
        in the log as well. `urgent`: somebody waits, so that room is made of whatever may go.

        Raises NoStore, NoPeers, InvalidUrl, and what `Puller.pull` does."""
        if not urls and not (others and digest):
            raise NoStore(
                "stores: none is named; say where from, file:///a/folder or s3://bucket/prefix, or name other agents and a digest"
            )
        if others and self.exchange is None:
            raise NoPeers
        level = logging.WARNING if complaints is None else logging.INFO
        complaints = complaints or Complaints()
        lock = self._pulls.setdefault((namespace, name), asyncio.Lock())
        with self._under_way(namespace, name, digest) as coming:
            async with lock, opened(urls, self._store.keyring) as stores:
                sources = [self.sources.measured(store, "store") for store in stores]

                def told(now: Progress) -> None:
                    self.arriving[namespace, name] = digest, now
                    progress(now)

                tell, look = coming.begun(SYSTEM_CLOCK.now(), told, fits)

                def fleet(namespace: str, digest: str) -> Fleet | None:
                    return self.exchange.fleet(namespace, digest, others, sources, self.sources) if self.exchange else None

                async def room(digest: str, size: int) -> None:
                    if self.disk:
                        beside = functools.partial(self.bytes_to_come, (namespace, name))
                        wanted = f"snapshot {namespace}/{name}@{digest[:12]}"
                        await self.disk.make_room(wanted, size, digest, urgent=urgent, coming=beside)

                def left(source: Source, error: Exception) -> None:
                    complaints.about(source, error)
                    self.sources.failed(source, error)

                puller = Puller(self._store, self._seen, sources, fleet, look, left, room, self.unfit)
                try:
                    snapshot = await puller.pull(namespace, name, digest, replace=replace, progress=tell)
                except FAILURES as error:
                    if self._observer:
                        self._observer.staging_failed("disk", reason_of(error))
                    raise
                finally:
                    self.arriving.pop((namespace, name), None)
                if self._observer and coming.progress.moved:
                    self._observer.staged("disk", coming.progress.moved, SYSTEM_CLOCK.now() - coming.since)
                await asyncio.to_thread(self._store.origins.add, snapshot.digest, urls)
                await self._forget_unfit(namespace, name)
                if coming.progress.moved >= _WORTH_MEASURING:
                    self.remote_to_disk.measured(coming.progress.moved, SYSTEM_CLOCK.now() - coming.since)
        self._changed(snapshot)
        named = [*map(str, stores), *(f"agent {other.address}" for other in others)]
        for complaint in complaints.texts:
            _LOG.log(level, "while snapshot %s came: %s", snapshot, complaint)
        _LOG.info("snapshot %s has come from %s", snapshot, ", ".join(named))
        return snapshot

    async def _forget_unfit(self, namespace: str, name: str) -> None:
        """All of it is here."""
        if self.unfit:
            try:
                await asyncio.to_thread(self.unfit.remove, namespace, name)
            except FAILURES as error:
                _LOG.warning("what %s/%s had for cold starts is still here beside it: %s", namespace, name, error)

    @contextlib.contextmanager
    def _under_way(self, namespace: str, name: str, digest: str) -> Iterator[Coming]:
        """Of all who ask for that snapshot at the same time: where one's fetch fails or is given up, the next one's goes on."""
        key = (namespace, name, digest)
        coming = self._coming.setdefault(key, Coming(digest))
        coming.askers += 1
        why = "its fetch was given up"
        try:
            yield coming
            why = ""
        except FAILURES as error:
            why = str(error)
            raise
        finally:
            coming.askers -= 1
            if not coming.askers:
                del self._coming[key]
            if not (why and coming.askers) and not coming.ended.done():
                coming.ended.set_result(why)

    def coming(self, namespace: str, name: str, digest: str) -> Coming | None:
        """The fetch of that snapshot (digest empty: whichever has the name) that is under way; None: there is none."""
        found = ((key, each) for key, each in self._coming.items() if key[:2] == (namespace, name))
        return next((each for key, each in found if "" in (digest, key[2]) or digest == key[2]), None)

    def bytes_to_come(self, but: tuple[str, str] | None = None) -> int:
        """What all that is on its way has still to bring onto the disk, but for that name."""
        return sum(progress.total - progress.done for name, (_, progress) in self.arriving.items() if name != but)

    async def stands_elsewhere(self, snapshot: Snapshot) -> bool:
        """Whether its name stands for it in a store that it came from, or was put into: that is asked now."""
        manifest = snapshot.manifest
        for url in await asyncio.to_thread(self._store.origins.of, snapshot.digest):
            try:
                async with asyncio.timeout(_ASKING_SECONDS):
                    found = await self.find(manifest.namespace, manifest.name, url, lambda manifest: None)
            except FAILURES as error:
                _LOG.info("snapshot %s stays on this disk as far as %s goes: %s", snapshot, url, error or "no answer")
                continue
            if found.digest == snapshot.digest:
                return True
        return False

    async def find(self, namespace: str, name: str, url: str, fits: Callable[[Manifest], None]) -> Found:
        """What the name stands for in a store. `fits`: as in Puller.

        Raises InvalidUrl, InvalidName, NotElsewhere, Denied, Unreachable, Altered, Untrusted, Replayed, Corrupt.
        """
        _check(namespace, name)
        async with opened([url], self._store.keyring) as stores:
            digest = await stands_for(await newest_record(stores, self._store.keyring, namespace, name), self._seen)
            _, _, manifest = await manifest_of(stores, self._store.keyring, namespace, name, digest)
        try:
            await asyncio.to_thread(fits, manifest)
        except Incompatible as error:
            return Found(digest, manifest, str(error))
        return Found(digest, manifest)

    async def copy(self, namespace: str, name: str, source: str, destination: str, progress: Callable[[Progress], None]) -> NameRecord:
        """From store to store. Raises InvalidUrl, InvalidName, and what `Copier.copy` does."""
        _check(namespace, name)
        keyring = self._store.keyring
        async with opened([source], keyring) as [come_from], opened_to_write(destination, keyring) as go_to:
            if str(come_from) == str(go_to):
                raise NoStore(f"stores: {come_from} is named twice; name another one to copy to")
            record = await Copier(self._store, self._seen, come_from, go_to).copy(namespace, name, progress)
        _LOG.info("snapshot %s/%s@%s has been copied from %s to %s", namespace, name, record.digest[:12], come_from, go_to)
        return record

    async def withdraw(self, namespace: str, name: str, url: str) -> str:
        """The digest that the name stood for in a store; empty: of nothing that counts here. Raises InvalidUrl, InvalidName, and what
        `withdrawal.withdraw` does."""
        _check(namespace, name)
        async with opened([url], self._store.keyring) as [store]:
            digest = await withdraw(self._store, self._seen, store, namespace, name)
        _LOG.info("name %s/%s was withdrawn from %s; it stood for %s", namespace, name, store, digest[:12] or "nothing that counts here")
        return digest

    async def collect(self, url: str, grace: float, *, dry_run: bool) -> Collected:
        """Of a store. Raises InvalidUrl, and what `Collector.collect` does."""
        async with opened([url], self._store.keyring) as [store]:
            collected = await Collector(self._store.keyring, store, grace).collect(dry_run=dry_run)
        if not dry_run:
            _LOG.info("%d chunks and %d files of manifests are gone from %s", collected.chunks.objects, collected.manifests.objects, store)
        return collected

    async def names(self, namespace: str, url: str) -> list[str]:
        """That a store has. Raises InvalidUrl, InvalidName, Denied, Unreachable."""
        check_name("namespace", namespace)
        async with opened([url], self._store.keyring) as [store]:
            return await names_in(store, namespace)


def _check(namespace: str, name: str) -> None:
    check_name("namespace", namespace)
    check_name("name", name)
