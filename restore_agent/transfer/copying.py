"""A snapshot on its way from one store into another, through this node, which keeps nothing of it.

Manifest, signature and chunks are copied as they are: the digest stays, and who signed it. Each chunk is verified as it comes, and put when
it is whole. What the other store has is neither fetched nor sent, so what was cut goes on where it stopped.

The name's record is copied, too, where it counts as newer there: the two stores then say the same number, and a node that reads both takes
neither for an older one. Where the other store has a number as high for another snapshot, this node signs a record above it, as a push
would. Rejected: a new record each time (a mirror would need a key that signs, and its original would look as if it were older).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from restore_agent.snapshots.catalog import Catalog
from restore_agent.snapshots.names import NameRecord, SeenNames
from restore_agent.transfer.contents import chunks_of
from restore_agent.transfer.fetch import Fetch
from restore_agent.transfer.finding import manifest_of, record_of, stands_for
from restore_agent.transfer.leases import uploading
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.publish import signed_above
from restore_agent.transfer.sending import Sending
from restore_agent.transfer.source import Destination, Source
from zerowake_shared.clock import SYSTEM_CLOCK, Clock


class Copier:
    """Copies snapshots from one store into another. The node's keys say what is believed."""

    def __init__(self, catalog: Catalog, seen: SeenNames, source: Source, destination: Destination, clock: Clock = SYSTEM_CLOCK) -> None:
        self._catalog = catalog
        self._seen = seen
        self._source = source
        self._destination = destination
        self._clock = clock

    async def copy(self, namespace: str, name: str, progress: Callable[[Progress], None] = lambda progress: None) -> NameRecord:
        """What the name stands for. `progress` is called in the loop. When this is ended, what was sent stays.

        Raises:
            NotElsewhere: the source does not have it. Untrusted, Replayed, Corrupt: what it has is not to be believed here.
            Denied, Unreachable, Altered: the source; Denied, Unreachable, Full: the destination, where nothing has the name that had not.
            NoSigningKey: the destination has another snapshot under the name, and this node cannot sign a record above it.
        """
        keyring = self._catalog.keyring
        record, signed = await record_of(self._source, keyring, namespace, name)
        digest = await stands_for(record, self._seen)
        data, signature, manifest = await manifest_of([self._source], keyring, namespace, name, digest)
        sending = Sending(self._destination, progress)
        before, number = await sending.named(keyring, namespace, name)
        is_there = before is not None and before.digest == digest
        if not is_there and record.sequence <= number:
            await asyncio.to_thread(keyring.check_signs)  # before an hour of work
        fetch = Fetch(lambda chunk: [self._source])
        chunks = await chunks_of(manifest, fetch)
        async with uploading(self._destination, digest, chunks, self._clock) as lease:
            sending.expect(chunks)
            await sending.chunks(chunks, fetch.bring)
            await sending.manifest(data, signature)
            if before is not None and is_there:
                return before
            if record.sequence <= number:
                record, signed = await signed_above(number, self._catalog, self._seen, namespace, name, digest, self._clock)
            await lease.alone()
            await sending.lost(fetch.bring)
            lease.check()
            await sending.name(namespace, name, signed)
        await asyncio.to_thread(self._seen.accept, record)
        return record
