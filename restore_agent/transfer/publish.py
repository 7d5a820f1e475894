"""A snapshot of this node on its way into a store, over many streams.

The order is what makes it safe to be ended anywhere: every chunk first, then signature and manifest, then the name. Until the name is there
nobody finds the snapshot, and the one that had the name before is whole. What the store has already, by name and size, is not sent; so
what was ended goes on where it stopped, and a second snapshot of the same engine sends its difference. Each chunk is verified as it is read
from the disk, so a store gets no byte that this node has lost.

Rejected: a list of all chunks of the store instead of a question for each (one of a fleet has millions, and the questions run beside each
other), and a number of the store's own for its names (two stores of one fleet would count differently, and nodes remember one number).
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from restore_agent.snapshots import durable
from restore_agent.snapshots.catalog import MANIFEST, Catalog, Snapshot
from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.keyring import Untrusted
from restore_agent.snapshots.manifest import digest_of
from restore_agent.snapshots.names import NameRecord, SeenNames
from restore_agent.transfer.contents import Held, held
from restore_agent.transfer.layout import LIMIT, chunk_key, manifest_key, name_key, signature_key
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.source import Absent, Destination, Piece, Unreachable, read_whole
from restore_agent.transfer.streams import STREAMS, Room, in_streams
from zerowake_shared.background import to_its_end
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

_LOG = logging.getLogger("zerowake.agent")
_MOST = 1 << 53  # a number that JSON's readers agree on
_TRIES = 4  # of one object
_FIRST_PAUSE, _LAST_PAUSE = 0.25, 5.0


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
        before, number = await self._named(namespace, name)  # first: what is denied is denied before an hour of work
        await self._send(await asyncio.to_thread(held, self._catalog, snapshot), progress)
        signature = await asyncio.to_thread(self._catalog.signature, snapshot)
        await self._put(signature_key(snapshot.digest), signature.encode())
        await self._put(manifest_key(snapshot.digest), await asyncio.to_thread(self._manifest, snapshot))
        if before and before.digest == snapshot.digest:
            return before
        published = datetime.datetime.fromtimestamp(self._clock.wall(), datetime.UTC).isoformat(timespec="seconds")
        last = max(number, await asyncio.to_thread(self._seen.last, namespace, name))
        record = NameRecord(namespace=namespace, name=name, digest=snapshot.digest, sequence=last + 1, published=published)
        await self._put(name_key(namespace, name), await asyncio.to_thread(record.encode_signed, self._catalog.keyring))
        await asyncio.to_thread(self._seen.accept, record)
        return record

    def _manifest(self, snapshot: Snapshot) -> bytes:
        data = durable.content(snapshot.directory / MANIFEST)
        if data is None or digest_of(data) != snapshot.digest:
            raise self._catalog.fault(snapshot, "its manifest was changed since it was read; take the snapshot again")
        return data

    async def _named(self, namespace: str, name: str) -> tuple[NameRecord | None, int]:
        """What has the name in the store now, and the number that it claims. One that does not count here does not keep us from taking
        its place, above its number: its key may have been revoked since."""
        try:
            data = await read_whole(self._destination, name_key(namespace, name), LIMIT)
        except Absent:
            return None, 0
        try:
            record = NameRecord.decode_signed(data, self._catalog.keyring, namespace, name)
        except Untrusted as error:
            claimed = _claimed(data)
            _LOG.warning("%s: %s: it is replaced", self._destination, error)
            return None, claimed
        return record, record.sequence

    async def _send(self, objects: Sequence[Held], progress: Callable[[Progress], None]) -> None:
        total, done, moved = sum(each.chunk.size for each in objects), 0, 0
        progress(Progress(0, 0, total))
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(STREAMS, "publish") as threads:

            async def send(each: Held, room: Room) -> None:
                nonlocal done, moved
                if not await self._has(each.chunk):
                    target = room.of(each.chunk.size)
                    await to_its_end(loop.run_in_executor(threads, each.read, target))
                    await self._put(chunk_key(each.chunk.hash), target)
                    moved += each.chunk.size
                done += each.chunk.size
                progress(Progress(done, moved, total))

            await in_streams(objects, STREAMS, send)

    async def _has(self, chunk: Chunk) -> bool:
        """One of another size was torn by whoever keeps the store, and is sent again."""
        try:
            return await self._destination.size(chunk_key(chunk.hash)) == chunk.size
        except Absent:
            return False

    async def _put(self, key: str, data: Piece) -> None:
        """Again where the store could not be reached: a put is whole or nothing."""
        backoff = Backoff(_FIRST_PAUSE, _LAST_PAUSE)
        for left in reversed(range(_TRIES)):
            try:
                return await self._destination.put(key, data)
            except Unreachable:
                if not left:
                    raise
                await asyncio.sleep(backoff.next())


def _claimed(data: bytes) -> int:
    try:
        number = json.loads(data)["record"]["sequence"]
    except (ValueError, LookupError, TypeError):
        return 0
    return number if isinstance(number, int) and 0 < number < _MOST else 0
