"""Objects on their way into a store, over many streams, in an order that may be ended anywhere.

Every chunk comes first, then signature and manifest, then the name. Until the name is there nobody finds the snapshot, and the one that had
the name before is whole. What the store has already, by name and size, is not sent; so what was ended goes on where it stopped, and a
second snapshot of the same engine sends its difference.

Rejected: a list of all chunks of the store instead of a question for each (one of a fleet has millions, and the questions run beside each
other).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from restore_agent.snapshots.chunks import Chunk
from restore_agent.snapshots.keyring import Keyring, Signature, Untrusted
from restore_agent.snapshots.manifest import digest_of
from restore_agent.snapshots.names import NameRecord
from restore_agent.transfer.layout import LIMIT, chunk_key, manifest_key, name_key, signature_key
from restore_agent.transfer.progress import Progress
from restore_agent.transfer.source import Absent, Destination, Piece, Unreachable, read_whole
from restore_agent.transfer.streams import STREAMS, Room, in_streams
from zerowake_shared.background import to_its_end
from zerowake_shared.backoff import Backoff
from zerowake_shared.json_text import parsed

_LOG = logging.getLogger("zerowake.agent")
_MOST = 1 << 53  # a number that JSON's readers agree on
_TRIES = 4  # of one object
_FIRST_PAUSE, _LAST_PAUSE = 0.25, 5.0


class Sending:
    """Puts one snapshot into a store. What is put is whole or not there; a store that cannot be reached is asked again."""

    def __init__(self, destination: Destination, progress: Callable[[Progress], None] = lambda progress: None) -> None:
        """`progress` is called in the loop, of chunks alone."""
        self._destination = destination
        self._tell = progress
        self._done, self._moved, self._total = 0, 0, 0
        self._found: list[Chunk] = []  # that were there when they were asked for

    async def named(self, keyring: Keyring, namespace: str, name: str) -> tuple[NameRecord | None, int]:
        """What has the name in the store now, and the number that it claims. One that does not count here does not keep us from taking
        its place, above its number: its key may have been revoked since. Raises Denied, Unreachable, Altered."""
        try:
            data = await read_whole(self._destination, name_key(namespace, name), LIMIT)
        except Absent:
            return None, 0
        try:
            record = await asyncio.to_thread(NameRecord.decode_signed, data, keyring, namespace, name)
        except Untrusted as error:
            _LOG.warning("%s: %s: it is replaced", self._destination, error)
            return None, _claimed(data)
        return record, record.sequence

    def expect(self, chunks: Iterable[Chunk]) -> None:
        """So many bytes are to be there in the end."""
        self._total += sum(chunk.size for chunk in chunks)
        self._told()

    async def chunks(self, chunks: Iterable[Chunk], read: Callable[[Chunk, memoryview], Awaitable[None]]) -> None:
        """Puts those that are missing. `read` fills memory of a chunk's size with its verified bytes.

        Raises:
            Denied, Unreachable, Full: the store. What `read` raises.
        """

        async def send(chunk: Chunk, room: Room) -> None:
            if await self._has(chunk):
                self._found.append(chunk)
            else:
                await self._send(chunk, room, read)
            self._done += chunk.size
            self._told()

        await in_streams(chunks, STREAMS, send)

    async def lost(self, read: Callable[[Chunk, memoryview], Awaitable[None]]) -> None:
        """Puts those anew that were there, and are no longer. Raises what `chunks` does."""

        async def look(chunk: Chunk, room: Room) -> None:
            if not await self._has(chunk):
                await self._send(chunk, room, read)
                self._told()

        await in_streams(self._found, STREAMS, look)

    async def manifest(self, data: bytes, signature: Signature) -> None:
        """Of a snapshot whose chunks are all there. Raises Denied, Unreachable, Full."""
        digest = digest_of(data)
        await self._put(signature_key(digest), signature.encode())
        await self._put(manifest_key(digest), data)

    async def name(self, namespace: str, name: str, record: bytes) -> None:
        """Gives the name to the snapshot of a signed record, which is all there. Raises Denied, Unreachable, Full."""
        # To its end: a name that came after the lease of its upload was removed could be one whose chunks a collection has taken.
        await to_its_end(self._put(name_key(namespace, name), record))

    def _told(self) -> None:
        self._tell(Progress(self._done, self._moved, self._total))

    async def _send(self, chunk: Chunk, room: Room, read: Callable[[Chunk, memoryview], Awaitable[None]]) -> None:
        target = room.of(chunk.size)
        await read(chunk, target)
        await self._put(chunk_key(chunk.hash), target)
        self._moved += chunk.size

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
        number = parsed(data)["record"]["sequence"]
    except (ValueError, LookupError, TypeError):
        return 0
    return number if isinstance(number, int) and 0 < number < _MOST else 0
