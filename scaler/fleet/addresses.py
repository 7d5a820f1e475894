"""Where the other programs of the system listen: sets of addresses that change while this one runs.

On Kubernetes they are the endpoints of a Service (scaler/kubernetes/endpoints.py). Elsewhere they are names, looked up again every two
seconds, since DNS tells nobody of a change: a headless Service's name stands for all its pods there, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator

from zerowake_shared.address import Address
from zerowake_shared.background import kept

log = logging.getLogger(__name__)

_LOOKUP_SECONDS = 2.0


class Addresses:
    """The set as it is now."""

    def __init__(self) -> None:
        self.unserving: frozenset[str] = frozenset()  # those that their cluster says nobody should ask
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

    def set(self, addresses: Iterable[str], unserving: Iterable[str] = ()) -> None:
        now, unserving = frozenset(addresses), frozenset(unserving)
        if (now, unserving) == (self._now, self.unserving):
            return
        self._now, self.unserving = now, unserving
        for callback in list(self._listeners):
            callback(now)


@contextlib.asynccontextmanager
async def looked_up(names: Collection[str]) -> AsyncIterator[Addresses]:
    """Every address of every `HOST:PORT`, followed until the block ends; `unix:` addresses are taken as they are."""
    addresses = Addresses()
    fixed = {name for name in names if name.startswith("unix:")}
    found = {name: frozenset[str]() for name in names if name not in fixed}

    async def look_up(name: str) -> None:
        host, port = Address.parse(name)
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found[name] = frozenset(str(Address(str(info[4][0]), port)) for info in infos)
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
    what = f"looking up {', '.join(names)}"
    task = asyncio.create_task(kept(again_and_again, what, log), name=what)
    try:
        yield addresses
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
