"""Snapshots that leave this node for a store, and come from one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from restore_agent.errors import AgentError, ErrorKind
from restore_agent.snapshots.names import SeenNames
from restore_agent.snapshots.store import Snapshot, Store
from restore_agent.transfer.exchange import Exchange
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.publish import Publisher
from restore_agent.transfer.pull import Puller
from restore_agent.transfer.store_url import opened

_LOG = logging.getLogger("zerowake.agent")


class NoStore(AgentError):
    """Nobody said where from."""

    kind = ErrorKind.INVALID
    reason = "invalid"


class Travel:
    """Of one node. `changed` hears of a snapshot that has come."""

    def __init__(self, store: Store, changed: Callable[[Snapshot], None]) -> None:
        self._store = store
        self._seen = SeenNames(store.state)
        self._changed = changed
        self.exchange: Exchange | None = None  # with other agents, where there is one

    async def push(self, snapshot: Snapshot, url: str, progress: Callable[[Progress], None]) -> None:
        """Raises InvalidUrl, and what `Publisher.publish` does."""
        async with opened([url]) as [destination]:
            with self._store.hold(snapshot):
                record = await Publisher(self._store, self._seen, destination).publish(snapshot, progress)
        _LOG.info("snapshot %s is in %s, as number %d of its name", snapshot, destination, record.sequence)

    async def pull(
        self, namespace: str, name: str, digest: str, urls: Sequence[str], progress: Callable[[Progress], None], *, replace: bool
    ) -> Snapshot:
        """Raises NoStore, InvalidUrl, and what `Puller.pull` does."""
        if not urls:
            raise NoStore("stores: none is named; say where from, file:///a/folder or s3://bucket/prefix")
        async with opened(urls) as sources:
            puller = Puller(self._store, self._seen, sources)
            snapshot = await puller.pull(namespace, name, digest, replace=replace, progress=progress)
        self._changed(snapshot)
        _LOG.info("snapshot %s has come from %s", snapshot, ", ".join(map(str, sources)))
        return snapshot
