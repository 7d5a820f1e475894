"""Where the other programs of the system listen: sets of addresses that change while this one runs.

On Kubernetes they are the endpoints of a Service, known from the API server's watch the moment they appear. Elsewhere they are names,
looked up again every two seconds, since DNS tells nobody of a change: a headless Service's name stands for all its pods there, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from typing import Protocol

import msgspec

from scaler.kubernetes.resources import Metadata

log = logging.getLogger(__name__)

_LOOKUP_SECONDS = 2.0
SERVICE_LABEL = "kubernetes.io/service-name"


class EndpointConditions(msgspec.Struct, frozen=True, rename="camel"):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Endpoint(msgspec.Struct, frozen=True):
    addresses: tuple[str, ...] = ()
    conditions: EndpointConditions = EndpointConditions()


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel"):
    """What is read of discovery.k8s.io/v1 EndpointSlice."""

    metadata: Metadata
    endpoints: tuple[Endpoint, ...] | None = None


class Slices(Protocol):
    """A live copy of a Service's EndpointSlices: scaler/kubernetes/informer.py."""

    def __iter__(self) -> Iterator[EndpointSlice]: ...

    def on_change(self, callback: Callable[[EndpointSlice | None, EndpointSlice | None], None]) -> None: ...


class Addresses:
    """The set as it is now."""

    def __init__(self) -> None:
        self._now: frozenset[str] = frozenset()
        self._listeners: list[Callable[[frozenset[str]], None]] = []

    @contextlib.contextmanager
    def told_to(self, callback: Callable[[frozenset[str]], None]) -> Iterator[None]:
        """Calls `callback(addresses)` at once, and at each change until the block ends."""
        self._listeners.append(callback)
        try:
            callback(self._now)
            yield
        finally:
            self._listeners.remove(callback)

    def set(self, addresses: Iterable[str]) -> None:
        now = frozenset(addresses)
        if now == self._now:
            return
        self._now = now
        for callback in list(self._listeners):
            callback(now)


def of_service(slices: Slices, port: int) -> Addresses:
    """Every endpoint of the Service, ready or not: one that is going away may still have something to say."""
    addresses = Addresses()

    def collect(_old: EndpointSlice | None, _new: EndpointSlice | None) -> None:
        found = (address for each in slices for endpoint in each.endpoints or () for address in endpoint.addresses)
        addresses.set(_joined(address, port) for address in found)

    slices.on_change(collect)
    return addresses


@contextlib.asynccontextmanager
async def looked_up(names: Collection[str]) -> AsyncIterator[Addresses]:
    """Every address of every `HOST:PORT`, followed until the block ends; `unix:` addresses are taken as they are."""
    addresses = Addresses()
    fixed = {name for name in names if name.startswith("unix:")}
    found = {name: frozenset[str]() for name in names if name not in fixed}

    async def look_up(name: str) -> None:
        host, _, port = name.rpartition(":")
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            found[name] = frozenset(_joined(str(info[4][0]), int(port)) for info in infos)
        except OSError as error:
            # No such name is an answer: a headless Service without pods has none. Any other failure leaves what was known.
            if isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
                found[name] = frozenset()
            else:
                log.warning("%s could not be looked up, what was known of it stays: %s", name, error)

    async def again_and_again() -> None:
        while True:
            await asyncio.sleep(_LOOKUP_SECONDS)
            await asyncio.gather(*map(look_up, found))
            addresses.set(fixed.union(*found.values()))

    await asyncio.gather(*map(look_up, found))
    addresses.set(fixed.union(*found.values()))
    task = asyncio.create_task(again_and_again(), name=f"looking up {', '.join(names)}")
    try:
        yield addresses
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
