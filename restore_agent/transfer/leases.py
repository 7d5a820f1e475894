"""Who is at work on a store: uploads, which count on chunks that are there already, and collections, which remove what nobody needs.

Each has an object of its own in the store for as long as it works, and puts it anew every minute; one that was not renewed for ten minutes,
by the store's own clock, is dead. Each puts its own before it looks for others. So of an upload and a collection that begin at once, one at
least sees the other, and that is enough: a collection keeps what living uploads name, and an upload that sees a living collection waits for
its end before it asks what the store has.

    upload:      lease with all its chunks → no collection lives → chunks, manifest → lease anew → no collection lives → what was there
                 when it was asked for is there still → name → lease removed
    collection:  lease → leases of uploads, then names (an upload that ends puts its name before its lease goes) → removes → lease removed

Who could not renew stops after half of the time, so nothing that it does comes after others took it for dead. Ages are differences between
two times of the store's clock, one of them that of the own lease; a local clock that is wrong does no harm. What this cannot see is a
machine that stands still between that look and the request that follows it.

Rejected: putting every chunk that is used again anew, to make it young (a bucket has no other way, and weights would be sent with each
snapshot); and a collection that stops where any upload lives (one that was killed would stop it).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from restore_agent.snapshots.chunks import Chunk
from restore_agent.transfer.layout import LEASES, LIMIT
from restore_agent.transfer.source import Absent, Altered, Destination, TransferError, Unreachable, read_whole
from zerowake_shared.background import beside
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.json_text import parsed

_LOG = logging.getLogger("zerowake.agent")
_UPLOAD, _COLLECTION = "upload", "collection"
_RENEW = 60.0  # seconds
_TRUSTED = 300.0  # seconds after which who could not renew stops
DEAD = 600.0  # seconds by the store's clock
_LOOK = 1.0  # seconds between two looks for a collection's end
_REMOVE = 10.0  # seconds that the removal of a lease may take


@dataclass(frozen=True, slots=True)
class Claim:
    """What an upload counts on."""

    digest: str
    chunks: tuple[str, ...]  # hashes

    def encode(self) -> bytes:
        return json.dumps({"version": 1, "digest": self.digest, "chunks": self.chunks}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Claim:
        """Raises ValueError."""
        try:
            said = parsed(data)
            if said["version"] != 1:
                raise ValueError(f"it has version {said['version']}")
            return cls(str(said["digest"]), tuple(str(chunk) for chunk in said["chunks"]))
        except (LookupError, TypeError) as error:
            raise ValueError(str(error)) from None


class Lease:
    """One that is held. Made by `uploading` and `collecting`."""

    def __init__(self, store: Destination, kind: str, content: bytes, clock: Clock) -> None:
        self._store = store
        self._content = content
        self._clock = clock
        self._key = f"{LEASES}/{kind}-{secrets.token_hex(8)}.json"
        self._at = clock.now(), clock.wall()
        self.now = 0.0  # by the store's clock, when it was looked at last, or before

    async def renew(self) -> None:
        """Raises Denied, Unreachable, Full."""
        at = self._clock.now(), self._clock.wall()
        try:
            async with asyncio.timeout(_RENEW):
                await self._store.put(self._key, self._content)
        except TimeoutError:
            raise Unreachable(f"{self._store} has not taken {self._key} in {_RENEW:g} s: is its network cut?") from None
        self._at = at

    def check(self) -> None:
        """Raises Unreachable: others may take it for dead by now."""
        if max(self._clock.now() - self._at[0], self._clock.wall() - self._at[1]) >= _TRUSTED:
            raise Unreachable(f"{self._store} could not be told for {_TRUSTED:g} s that this node is at work on it: begin again")

    async def keep(self) -> None:
        """Renews it for ever. Raises what `check` does, and Denied, Full."""
        while True:
            await asyncio.sleep(_RENEW)
            try:
                await self.renew()
            except Unreachable as error:
                _LOG.warning("%s", error)
                self.check()

    async def others(self, kind: str) -> list[str]:
        """Keys of the living ones of that kind. Raises Denied, Unreachable; also where the own one is gone."""
        found = {stored.key: stored.modified async for stored in self._store.objects(LEASES)}
        if self._key not in found:
            raise Unreachable(f"{self._store} has lost {self._key}, by which others know that this node is at work on it: begin again")
        self.now = found.pop(self._key)
        return [key for key, at in found.items() if key.startswith(f"{LEASES}/{kind}-") and self.now - at < DEAD]

    async def uploads(self) -> list[Claim]:
        """What living uploads count on. Raises Denied, Unreachable; Altered: one cannot be read."""
        found = []
        for key in await self.others(_UPLOAD):
            try:
                found.append(Claim.decode(await read_whole(self._store, key, LIMIT)))
            except Absent:
                continue  # it has ended
            except ValueError as error:
                raise Altered(
                    f"{key} of {self._store} does not say what an upload needs ({error}): it counts for {DEAD / 60:g} minutes"
                ) from None
        return found

    async def collections(self) -> list[str]:
        """Keys of other collections that live. Raises Denied, Unreachable."""
        return await self.others(_COLLECTION)

    async def alone(self) -> None:
        """Renewed; no collection lives that did not see it. Raises Denied, Unreachable, Full."""
        await self.renew()
        told = False
        while running := await self.collections():
            if not told:
                _LOG.info("%s is being collected (%s): the upload waits for its end", self._store, running[0])
                told = True
            await asyncio.sleep(_LOOK)

    async def remove(self) -> None:
        """It dies by itself where it cannot be removed."""
        try:
            async with asyncio.timeout(_REMOVE):
                await self._store.remove(self._key)
        except (TransferError, TimeoutError) as error:
            _LOG.warning("%s of %s is not removed, and counts for %g minutes more: %s", self._key, self._store, DEAD / 60, error)


@contextlib.asynccontextmanager
async def uploading(store: Destination, digest: str, chunks: Iterable[Chunk], clock: Clock = SYSTEM_CLOCK) -> AsyncIterator[Lease]:
    """No collection removes these chunks, whether they are there already or come, nor the manifest, while the block lasts.

    Raises Denied, Unreachable, Full: the store.
    """
    content = Claim(digest, tuple(chunk.hash for chunk in chunks)).encode()
    async with _held(Lease(store, _UPLOAD, content, clock)) as lease:
        await lease.alone()
        yield lease


@contextlib.asynccontextmanager
async def collecting(store: Destination, *, removes: bool, clock: Clock = SYSTEM_CLOCK) -> AsyncIterator[Lease]:
    """`removes`: else it is only looked at what would be removed, and nobody has to wait for that. Raises as `uploading`."""
    kind, content = (_COLLECTION, b"{}") if removes else (_UPLOAD, Claim("", ()).encode())
    async with _held(Lease(store, kind, content, clock)) as lease:
        yield lease


@contextlib.asynccontextmanager
async def _held(lease: Lease) -> AsyncIterator[Lease]:
    try:
        await lease.renew()
        async with beside(lease.keep(), "lease of a store"):
            yield lease
    except Unreachable:
        raise  # the store may still do what it was asked for last, so the lease stays until it dies
    except BaseException:
        await lease.remove()
        raise
    await lease.remove()
