"""A live copy of some objects of the cluster: list, then watch, for as long as it is open.

A watch goes on from the version of the last event or bookmark, so a reconnect costs nothing; when that version is too old (410), or the
stream is of no use, the list is made anew and compared, so that what vanished meanwhile is told as deleted. Errors wait 0.2 s to 30 s,
with jitter, since all replicas see an API server come back at the same moment. Every ten minutes each object is told again as if it had
changed (resync): whoever missed or mishandled one gets another chance.
Readers see plain attributes and never wait. The event loop is the lock.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import TracebackType
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import msgspec

from zerowake_shared.background import ended, told
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CHANCE
from zerowake_shared.kubernetes.errors import Expired
from zerowake_shared.kubernetes.resource import Resource

log = logging.getLogger(__name__)

T = TypeVar("T")
Key = tuple[str, str]
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.2, 30.0
_RESYNC_SECONDS = 600.0
_PAGE = "500"


class _Version(msgspec.Struct, rename="camel"):
    resource_version: str


class _Identity(msgspec.Struct):
    name: str
    namespace: str = ""


class _Identified(msgspec.Struct):
    """Any object, as far as it must be understood to be followed."""

    metadata: _Identity


class _Bookmark(msgspec.Struct):
    metadata: _Version


class Page(NamedTuple):
    items: list[msgspec.Raw]
    version: str
    next: str


class Source(Protocol):
    """Where lists and watches come from: the cluster."""

    async def page(self, resource: Resource, namespace: str, query: Mapping[str, str]) -> Page: ...

    def watch(self, resource: Resource, namespace: str, query: Mapping[str, str]) -> AsyncIterator[tuple[str, msgspec.Raw]]: ...


class Informer(Generic[T]):
    """Objects by (namespace, name). `synced` is set from the first whole list on."""

    def __init__(
        self,
        source: Source,
        resource: Resource,
        kind: type[T],
        namespace: str,
        selectors: Mapping[str, str],
        resync_seconds: float = _RESYNC_SECONDS,
        chance: random.Random = SYSTEM_CHANCE,
    ) -> None:
        self.synced = asyncio.Event()
        self._source = source
        self._resource = resource
        self._decoder = msgspec.json.Decoder(kind)
        self._namespace = namespace
        self._selectors = selectors
        self._resync = resync_seconds
        self._chance = chance
        self._objects: dict[Key, T] = {}
        self._listeners: list[Callable[[T | None, T | None], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._version = ""
        self._shown: set[Key] = set()  # by `show`, since the last list was begun: it is newer than that, or has gone

    def __iter__(self) -> Iterator[T]:
        return iter(self._objects.values())

    def __len__(self) -> int:
        return len(self._objects)

    def get(self, namespace: str, name: str) -> T | None:
        return self._objects.get((namespace, name))

    def on_change(self, callback: Callable[[T | None, T | None], None]) -> None:
        """Calls `callback(old, new)` at each change; old is None for a new object, new for a deleted one, both the same at a resync."""
        self._listeners.append(callback)
        for found in list(self._objects.values()):
            callback(None, found)

    def show(self, namespace: str, name: str, found: T) -> None:
        """Takes an object that was read in another way, as while the watch is broken; when the watch ends, a list confirms it."""
        self._shown.add((namespace, name))
        self._apply((namespace, name), found)

    async def __aenter__(self) -> Self:
        for work in (self._follow(), self._tell_again()):
            task = asyncio.create_task(work, name=f"informer of {self._resource.plural}")
            told(task, log)
            self._tasks.append(task)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await ended(self._tasks)

    async def _follow(self) -> None:
        backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS, jitter=0.5, chance=self._chance)
        while True:
            try:
                while not self._version or self._shown:
                    await self._list()
                if await self._watch():
                    backoff.reset()
                    continue
                pause = backoff.next()
            except Expired:
                self._version = ""
                pause = backoff.next()
            except Exception as error:  # whatever the cluster answers, a copy that is no longer fed would be wrong for ever
                self._version = "" if isinstance(error, msgspec.MsgspecError) else self._version
                pause = backoff.next()
                log.warning("following %s is interrupted, again in %.1f s: %s", self._resource.plural, pause, error)
            await asyncio.sleep(pause)

    async def _list(self) -> None:
        self._shown.clear()
        found, version = await self._pages()
        for key in [key for key in self._objects if key not in found and key not in self._shown]:
            self._apply(key, None)
        for key, each in found.items():
            if each is not None:
                self._apply(key, each)
        self._shown -= found.keys()
        self._version = version
        self.synced.set()

    async def _pages(self) -> tuple[dict[Key, T | None], str]:
        """All objects, and the version from which a watch goes on; None: of one that is there and cannot be read."""
        query = {**self._selectors, "limit": _PAGE}
        found: dict[Key, T | None] = {}
        while True:
            page = await self._source.page(self._resource, self._namespace, query)
            for raw in page.items:
                if (key := self._key(raw)) is not None:
                    found[key] = self._decode(key, raw)
            if not page.next:
                return found, page.version
            query["continue"] = page.next

    async def _watch(self) -> bool:
        """One stream, to its end. Whether it brought anything."""
        query = {
            **self._selectors,
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(self._chance.randint(240, 480)),  # spread: all streams began when the API server did
        }
        heard = False
        async for kind, raw in self._source.watch(self._resource, self._namespace, query):
            heard = True
            if kind != "BOOKMARK" and (key := self._key(raw)) is not None:
                if kind == "DELETED":
                    self._apply(key, None)
                elif (each := self._decode(key, raw)) is not None:
                    self._apply(key, each)
            self._version = msgspec.json.decode(raw, type=_Bookmark).metadata.resource_version
        return heard

    def _key(self, raw: msgspec.Raw) -> Key | None:
        try:
            metadata = msgspec.json.decode(raw, type=_Identified).metadata
        except msgspec.ValidationError as error:
            log.error("an object among the %s has no name: %s", self._resource.plural, error)
            return None
        return metadata.namespace, metadata.name

    def _decode(self, key: Key, raw: msgspec.Raw) -> T | None:
        """An object that is not as declared is passed over, and known as it was: it must not hide all others."""
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            log.error("%s %s/%s is passed over, it is not as its schema says: %s", self._resource.kind, *key, error)
            return None

    def _apply(self, key: Key, new: T | None) -> None:
        old = self._objects.get(key)
        if new is None:
            if old is None:
                return
            del self._objects[key]
        else:
            self._objects[key] = new
            if old == new:
                return
        self._tell(old, new)

    def _tell(self, old: T | None, new: T | None) -> None:
        for callback in self._listeners:
            try:
                callback(old, new)
            except Exception:  # of one listener, at one object: the others hear of it, and of all that comes
                log.exception("a change among the %s was mishandled; it is told again at the next resync", self._resource.plural)

    async def _tell_again(self) -> None:
        while True:
            await asyncio.sleep(self._resync * self._chance.uniform(0.8, 1.2))
            for found in list(self._objects.values()):
                self._tell(found, found)
