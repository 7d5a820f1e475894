"""A snapshot of this node on its way into a store (sending.py says in which order).

Each chunk is verified as it is read from the disk, so a store gets no byte that this node has lost.

Rejected: a number of the store's own for its names (two stores of one fleet would count differently, and nodes remember one number).
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from restore_agent.snapshots.catalog import MANIFEST, Catalog, Snapshot
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.manifest import digest_of
from restore_agent.snapshots.names import NameRecord, SeenNames
from restore_agent.transfer.contents import held
from restore_agent.transfer.leases import uploading
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.sending import Sending
from restore_agent.transfer.source import Destination
from restore_agent.transfer.streams import STREAMS
from zerowake_shared import durable
from zerowake_shared.background import to_its_end
from zerowake_shared.clock import SYSTEM_CLOCK, Clock


class Publisher:
    """Puts snapshots of this node into one store. The caller holds a lease on what is read (`Store.hold`)."""

    def __init__(self, catalog: Catalog, seen: SeenNames, destination: Destination, clock: Clock = SYSTEM_CLOCK) -> None:
        self._catalog = catalog
        self._seen = seen
        self._destination = destination
        self._clock = clock

    async def publish(self, snapshot: Snapshot, progress: Callable[[Progress], None] = lambda progress: None) -> NameRecord:
        """`progress` is called in the loop. When this is ended, what was sent stays, and the next one does not send it again.

        Raises:
            NoSigningKey, Untrusted: this node signs nothing.
            Corrupt: this node's own bytes are not what was published.
            NotFound: the snapshot was removed meanwhile.
            Denied, Unreachable, Full: the store; nothing has the name that had not before.
        """
        self._catalog.keyring.check_signs()
        namespace, name = snapshot.manifest.namespace, snapshot.manifest.name
        sending = Sending(self._destination, progress)
        before, number = await sending.named(self._catalog.keyring, namespace, name)  # what is denied is denied before an hour of work
        objects = {each.chunk: each for each in await asyncio.to_thread(held, self._catalog, snapshot)}
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(STREAMS, "publish") as threads:

            async def read(chunk: Chunk, target: memoryview) -> None:
                await to_its_end(loop.run_in_executor(threads, objects[chunk].read, target))

            async with uploading(self._destination, snapshot.digest, objects, self._clock) as lease:
                sending.expect(objects)
                await sending.chunks(objects, read)
                signature = await asyncio.to_thread(self._catalog.signature, snapshot)
                await sending.manifest(await asyncio.to_thread(self._manifest, snapshot), signature)
                if before and before.digest == snapshot.digest:
                    return before
                record, data = await signed_above(number, self._catalog, self._seen, namespace, name, snapshot.digest, self._clock)
                await lease.alone()
                await sending.lost(read)
                lease.check()
                await sending.name(namespace, name, data)
        await asyncio.to_thread(self._seen.accept, record)
        return record

    def _manifest(self, snapshot: Snapshot) -> bytes:
        data = durable.content(snapshot.directory / MANIFEST)
        if data is None or digest_of(data) != snapshot.digest:
            raise self._catalog.fault(snapshot, "its manifest was changed since it was read; take the snapshot again")
        return data


async def signed_above(
    number: int, catalog: Catalog, seen: SeenNames, namespace: str, name: str, digest: str, clock: Clock
) -> tuple[NameRecord, bytes]:
    """A record that gives the name to the snapshot of that digest, above this number and every one that this node has seen; with its bytes.

    Raises NoSigningKey, Untrusted.
    """
    published = datetime.datetime.fromtimestamp(clock.wall(), datetime.UTC).isoformat(timespec="seconds")
    last = max(number, await asyncio.to_thread(seen.last, namespace, name))
    record = NameRecord(namespace=namespace, name=name, digest=digest, sequence=last + 1, published=published)
    return record, await asyncio.to_thread(record.encode_signed, catalog.keyring)
