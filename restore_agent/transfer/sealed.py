"""A store whose objects are encrypted: a layer over a folder or a bucket, to which both are what they were.

Chunks lie under other names there: BLAKE3 of their key, keyed by the encryption key. A plain hash would tell whoever reads the bucket which
of the files that he has are in it. Manifests and signatures keep their names, which are made of a manifest's digest; that is in the records
of names, too, which stay readable (they are signed, and hold nothing else). Nobody can guess a manifest from its digest: it names the
chunks of an engine's memory.

A snapshot lies under one key as a whole: what is there under another one counts as not there when something is put. So after a key was
changed, what is pushed again is encrypted by the new one, and the old one is needed for nothing of it. For reading, the key that had the
last chunk is tried first.

An object's range is read by segments (sealing.py), so a transfer that was cut goes on where it stopped; one that is compressed begins anew,
which costs a chunk at most.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Executor

from blake3 import blake3

from restore_agent.snapshots.encryption_keys import EncryptionKey
from restore_agent.transfer.layout import CHUNKS, chunk_key, is_readable
from restore_agent.transfer.sealing import HEAD, ROOM, SEGMENT, Head, Spoiled, Unsealing, seal, stored_payload
from restore_agent.transfer.source import Absent, Altered, Denied, Destination, Piece, Stored
from restore_agent.transfer.spare_memory import SpareMemory
from zerowake_shared.background import to_its_end


class Sealed:
    """A Destination over another one. By the first of the keys it encrypts; by all of them it decrypts."""

    def __init__(self, inner: Destination, keys: Sequence[EncryptionKey], where: str, threads: Executor) -> None:
        """`keys`: one at least. `where`: of the keys, for messages. `threads`: where it is encrypted and decrypted."""
        self._inner = inner
        self._keys = {key.id: key for key in keys}
        self._encrypts = keys[0]
        self._last = keys[0]  # that a chunk was found under
        self._where = where
        self._threads = threads
        self._spare = SpareMemory(ROOM)  # to decrypt into

    def __str__(self) -> str:
        return str(self._inner)

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        """See Source. Raises also Altered: it is not what was put there; Denied: it is encrypted by a key that is not here."""
        pieces = self._inner.read(key, offset, length) if is_readable(key) else self._read(key, offset, length)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def size(self, key: str) -> int:
        """In clear. See Source. -1: the object is no whole one."""
        if is_readable(key):
            return await self._inner.size(key)
        for name, _ in self._places(key):
            with contextlib.suppress(Absent):
                stored, data = await self._inner.size(name), await self._head(name)
                try:
                    head = Head.decode(data)
                except Spoiled:
                    return -1
                return head.size if head.stored == stored and head.key in self._keys else -1
        raise Absent(f"{self} has no {key}")

    async def objects(self, prefix: str) -> AsyncIterator[Stored]:
        """See Listed: under their names there, with the sizes that they have there."""
        async for stored in self._inner.objects(prefix):
            yield stored

    async def unfinished(self) -> AsyncIterator[Stored]:
        """See Destination."""
        async for stored in self._inner.unfinished():
            yield stored

    async def put(self, key: str, data: Piece) -> None:
        """See Destination."""
        if is_readable(key):
            return await self._inner.put(key, data)
        sealing = asyncio.get_running_loop().run_in_executor(self._threads, seal, data, key, self._encrypts)
        await self._inner.put(_name(key, self._encrypts), await to_its_end(sealing))

    async def remove(self, key: str) -> None:
        """The object of that name, as `objects` has it. See Destination."""
        await self._inner.remove(key)

    def names(self, keys: Iterable[str]) -> set[str]:
        """All under which objects of these keys may lie, as `objects` has them."""
        return {name for key in keys for name, _ in self._places(key)}

    async def _read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        if not length:
            return
        for name, only in self._places(key):
            try:
                async with contextlib.aclosing(self._opened(name, key, only, offset, length)) as pieces:
                    async for piece in pieces:
                        self._last = only or self._last
                        yield piece
            except Absent:
                continue
            except Spoiled as error:
                raise Altered(f"{name} of {self} {error}: replace it from a whole copy, or push the snapshot again") from None
            return
        raise Absent(f"{self} has no {key}, by key {' or '.join(self._keys)}")

    async def _opened(self, name: str, key: str, only: EncryptionKey | None, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        """`only`: the key by which it has to be encrypted. Raises Spoiled, too."""
        unsealing, begin, at = None, b"", 0
        if offset:
            unsealing = self._unsealing(await self._head(name), key, only, offset)
            at = unsealing.begins_at
        end = HEAD + stored_payload(-(-(offset + length) // SEGMENT) * SEGMENT)
        async with contextlib.aclosing(self._stored(name, at, end - at)) as pieces:
            async for piece in pieces:
                data = memoryview(piece)
                if unsealing is None:
                    lacks = HEAD - len(begin)
                    begin, data = begin + bytes(data[:lacks]), data[lacks:]
                    if len(begin) < HEAD:
                        continue
                    unsealing = self._unsealing(begin, key, only, 0)
                steps = unsealing.pieces(data)
                while (opened := await asyncio.get_running_loop().run_in_executor(self._threads, next, steps, None)) is not None:
                    try:
                        yield opened[:length]
                    except BaseException:
                        self._spare.give(unsealing.room)
                        raise
                    length -= min(length, len(opened))
                    if not length:
                        break
                if not length or unsealing.is_done:
                    self._spare.give(unsealing.room)
                    return
        if unsealing is None:
            Head.decode(begin)
        raise Spoiled("is cut off")

    async def _stored(self, name: str, at: int, first: int) -> AsyncGenerator[Piece, None]:
        """What is stored from `at` on to its end; so many bytes are asked for at a time."""
        while True:
            came = 0
            async with contextlib.aclosing(self._inner.read(name, at, first)) as pieces:
                async for piece in pieces:
                    came += len(piece)
                    yield piece
            if came < first:
                return
            at += came

    async def _head(self, name: str) -> bytes:
        data = bytearray()
        async with contextlib.aclosing(self._inner.read(name, 0, HEAD)) as pieces:
            async for piece in pieces:
                data += piece
        return bytes(data)

    def _unsealing(self, data: bytes, key: str, only: EncryptionKey | None, offset: int) -> Unsealing:
        head = Head.decode(data)
        if only and head.key != only.id:
            raise Spoiled("belongs under another name")
        if head.key not in self._keys:
            raise Denied(
                f"{key} of {self} is encrypted by key {head.key}, and {self._where} has {' and '.join(self._keys)}: bring that one there "
                f"as encryption/{head.key}.key from a node that has it, or push the snapshot again from that node"
            )
        return Unsealing(head, key, self._keys[head.key], offset, self._spare.take())

    def _places(self, key: str) -> Iterator[tuple[str, EncryptionKey | None]]:
        """The names under which it may lie, and the key that it has to be encrypted by there, if that is known."""
        if not key.startswith(f"{CHUNKS}/"):
            yield key, None
            return
        for each in sorted(self._keys.values(), key=lambda each: each is not self._last):
            yield _name(key, each), each


def _name(key: str, by: EncryptionKey) -> str:
    return chunk_key(blake3(key.encode(), key=by.naming).hexdigest()) if key.startswith(f"{CHUNKS}/") else key
