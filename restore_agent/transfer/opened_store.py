"""A store as it says that it is: plain, or encrypted and by which key.

    store.json      {"version": 1, "encryption": "<ID of a key>"}, or null where it is plain

It is read before anything else of the store. It is made when the first snapshot is put into an empty store: one that is encrypted, if the
node has a key to encrypt by; else a plain one, where its owner allows that. A store without it was there before there was encryption, and
is plain.

It is not signed, for nothing hangs on it that could be lost: what it says wrong only ends in a refusal. A node with a key puts nothing into
a store that says it is plain, and what is encrypted is known by its first bytes. The ID that it names is that of the key which last put
something there. By which key a snapshot is encrypted, the snapshot's objects say.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from restore_agent.snapshots.encryption_keys import EncryptionKey, EncryptionKeys, NoEncryptionKey
from restore_agent.transfer.layout import CHUNKS, DESCRIPTION, NAMES, SNAPSHOTS
from restore_agent.transfer.sealed import Sealed
from restore_agent.transfer.sealing import MAGIC
from restore_agent.transfer.source import Absent, Altered, Denied, Destination, Piece, Stored, read_whole
from zerowake_shared.json_text import parsed

_VERSION = 1
_LIMIT = 64 << 10  # bytes of a description
_ID = re.compile(r"[0-9a-f]{16}")
_NOT_DESCRIBED = None, False


class Closable(Destination, Protocol):
    """A folder or a bucket."""

    async def close(self) -> None: ...


class OpenedStore:
    """A Destination over another one, which it closes. What kind of store it is, it finds out at its first use.

    Every call raises Denied, Altered, Unreachable also where that cannot be found out, or this node cannot use such a store.
    """

    def __init__(self, inner: Closable, keys: EncryptionKeys, *, writes: bool, begins_plain: bool = True) -> None:
        """`writes`: snapshots are put into it; else it is read, and cleaned. `begins_plain`: also into an empty one without a key."""
        self._inner = inner
        self._keys = keys
        self._writes = writes
        self._begins_plain = begins_plain
        self._found: Destination | None = None
        self._finding = asyncio.Lock()
        self._threads = ThreadPoolExecutor(os.cpu_count(), f"keys of {inner}")

    def __str__(self) -> str:
        return str(self._inner)

    async def close(self) -> None:
        """See Directory.close."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._inner.close()

    async def read(self, key: str, offset: int, length: int) -> AsyncGenerator[Piece, None]:
        """See Source."""
        store = await self._store()
        looked_at = isinstance(store, Sealed) or not key.startswith(f"{SNAPSHOTS}/")
        async with contextlib.aclosing(store.read(key, offset, length)) as pieces:
            async for piece in pieces:
                if not looked_at and bytes(piece[: len(MAGIC)]) == MAGIC:
                    raise Altered(
                        f"{key} of {self} is encrypted, and {DESCRIPTION} there says that the store is not, or is gone: "
                        "somebody changed it; bring it back, or use another store"
                    )
                looked_at = True
                yield piece

    async def size(self, key: str) -> int:
        """See Source."""
        return await (await self._store()).size(key)

    async def objects(self, prefix: str) -> AsyncIterator[Stored]:
        """See Listed. Chunks of an encrypted store have other names there: `names` says which."""
        async for stored in (await self._store()).objects(prefix):
            yield stored

    async def unfinished(self) -> AsyncIterator[Stored]:
        """See Destination."""
        async for stored in (await self._store()).unfinished():
            yield stored

    async def put(self, key: str, data: Piece) -> None:
        """See Destination."""
        await (await self._store()).put(key, data)

    async def remove(self, key: str) -> None:
        """The object of that name, as `objects` has it. See Destination."""
        await (await self._store()).remove(key)

    async def names(self, keys: Iterable[str]) -> set[str]:
        """All under which objects of these keys may lie, as `objects` has them."""
        store = await self._store()
        return store.names(keys) if isinstance(store, Sealed) else set(keys)

    async def _store(self) -> Destination:
        async with self._finding:
            if self._found is None:
                try:
                    self._found = await (self._to_write() if self._writes else self._to_read())
                except NoEncryptionKey as error:
                    raise Denied(f"{self}: {error}") from None
            return self._found

    async def _to_read(self) -> Destination:
        encryption, _ = await self._described()
        if not encryption:
            return self._inner
        keys = await asyncio.to_thread(self._keys.all)
        if not keys:
            raise Denied(
                f"{self} is encrypted by key {encryption}, and {self._keys.folder} has no key to decrypt by: {self._way(encryption)}"
            )
        return self._sealed(*(key for key, _ in keys.values()))

    async def _to_write(self) -> Destination:
        ours = await asyncio.to_thread(self._keys.encrypts)
        encryption, is_described = await self._described()
        if not is_described and await self._is_empty():
            if not ours and not self._begins_plain:
                raise Denied(
                    f"{self} is empty, and {self._keys.folder} has no encryption.key, so that what is put there would not be encrypted: "
                    "make one for all nodes (`zerowake key make --encryption`), or allow plain stores (the agent's --plain-stores, the "
                    "chart's agent.stores.plain)"
                )
            await self._describe(ours)
            return self._sealed(ours) if ours else self._inner
        if not encryption and not ours:
            return self._inner
        if not encryption:
            assert ours
            raise Denied(
                f"{self} is not encrypted, and this node encrypts by key {ours.id}: put snapshots into another store, which may be an "
                f"empty folder or prefix beside it and is encrypted then, or take encryption.key from {self._keys.folder}"
            )
        if not ours:
            raise Denied(f"{self} is encrypted by key {encryption}, and {self._keys.folder} has no encryption.key: {self._way(encryption)}")
        if ours.id != encryption:
            if encryption not in await asyncio.to_thread(self._keys.all):
                raise Denied(
                    f"{self} is encrypted by key {encryption}, and {self._keys.folder} has not that one but {ours.id}: "
                    f"{self._way(encryption)}, or use another store"
                )
            await self._describe(ours)
        return self._sealed(ours)

    def _way(self, encryption: str) -> str:
        return f"bring it there, as encryption.key or encryption/{encryption}.key, from a node that has it"

    def _sealed(self, *keys: EncryptionKey) -> Sealed:
        return Sealed(self._inner, keys, str(self._keys.folder), self._threads)

    async def _described(self) -> tuple[str | None, bool]:
        """The ID of its key, none if it is plain; and whether it says so."""
        try:
            data = await read_whole(self._inner, DESCRIPTION, _LIMIT)
        except Absent:
            return _NOT_DESCRIBED
        torn = Altered(f"{DESCRIPTION} of {self} is torn: bring it back, or use another store")
        try:
            said = parsed(data)
            version, encryption = said["version"], said["encryption"]
        except (ValueError, LookupError, TypeError):
            raise torn from None
        if version != _VERSION:
            raise Denied(
                f"{DESCRIPTION} of {self} has version {json.dumps(version)[:20]}, and this zerowake knows {_VERSION}: use a newer one"
            )
        if encryption is not None and not (isinstance(encryption, str) and _ID.fullmatch(encryption)):
            raise torn
        return encryption, True

    async def _describe(self, key: EncryptionKey | None) -> None:
        said = {"version": _VERSION, "encryption": key.id if key else None}
        await self._inner.put(DESCRIPTION, (json.dumps(said) + "\n").encode())

    async def _is_empty(self) -> bool:
        for prefix in (NAMES, SNAPSHOTS, CHUNKS):
            async for _ in self._inner.objects(prefix):
                return False
        return True
