"""Several gateways in one process that know each other over real connections, each through a relay that can be cut or go silent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.fleet.addresses import Addresses
from scaler.fleet.peers import Peers
from scaler.fleet.shared_places import SharedPlaces
from scaler.gateway.dispatcher import Backend, Dispatcher, Endpoint
from tests.worlds.waiting import until

MODEL = "m"
MODELS = MODEL, "n", "o"


class Engines:
    """The replicas, all of them: how many requests each works on, and has worked on at most."""

    def __init__(self) -> None:
        self.working: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.order: list[str] = []  # the gateways whose requests came, one after the other
        self._step = asyncio.Condition()
        self.open = asyncio.Event()  # requests that are worked on end
        self.open.set()

    async def work(self, replica: str, gateway: str) -> None:
        self.order.append(gateway)
        self.working[replica] = self.working.get(replica, 0) + 1
        self.most[replica] = max(self.most.get(replica, 0), self.working[replica])
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            await self.open.wait()
        finally:
            self.working[replica] -= 1


class Site:
    """One gateway."""

    def __init__(self, name: str, engines: Engines, concurrency: int, take_seconds: float) -> None:
        self.name = name
        self.engines = engines
        self.ledger = Ledger({model: ModelLimits(concurrency=concurrency) for model in MODELS})
        self.peers = Peers(self.ledger, grace_seconds=0.2)
        self.places = SharedPlaces(self.ledger, self.peers, take_seconds)
        self.dispatcher = Dispatcher(self.ledger, self.places)
        self.addresses = Addresses()
        self.relay = Relay()
        self._ending = AsyncExitStack()

    async def begin(self) -> None:
        address = await self._ending.enter_async_context(self.peers.serve("127.0.0.1:0"))
        await self.relay.open(address)
        await self._ending.enter_async_context(self.peers.follow(self.addresses))
        self._ending.callback(self.places.close)

    async def end(self) -> None:
        """As one does that has drained."""
        await self._ending.aclose()
        await self.dispatcher.close()
        self.relay.cut()

    async def die(self) -> None:
        """To the others it looks as if it had been killed: its port refuses, its connections are reset, its requests have ended."""
        self.relay.cut()
        await self.end()

    def replica(self, *names: str, model: str = MODEL) -> None:
        for name in names:
            self.dispatcher.add(Backend(name, model, Endpoint("127.0.0.1", 1)))

    def ask(self, model: str = MODEL) -> asyncio.Task[None]:
        return asyncio.create_task(self._ask(model))

    async def _ask(self, model: str) -> None:
        member = self.dispatcher.take(model)
        if member is None:
            hold = self.dispatcher.hold(model, "tenant", Priority.NORMAL, 0)
            try:
                member = await hold.future
            except BaseException:
                self.dispatcher.leave(hold)
                raise
        try:
            await self.engines.work(member.backend.id, self.name)
        finally:
            self.dispatcher.release(member)


class Relay:
    """Passes bytes on between a site's address, as the others have it, and the site."""

    def __init__(self) -> None:
        self.address = ""
        self.silent = False  # connections are made and nothing comes through
        self._resumed = asyncio.Event()
        self._target = ("", 0)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    def silence(self, silent: bool) -> None:
        self.silent = silent
        if not silent:
            for writer in self._writers:  # what was lost on the way is lost
                writer.transport.abort()
            self._resumed.set()
            self._resumed = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self.silent:
            await self._resumed.wait()
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(back)
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                if self.silent:
                    await self._resumed.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def gateways(count: int, *, concurrency: int = 1, replicas: int = 1, take_seconds: float = 10.0) -> AsyncIterator[list[Site]]:
    """As many that all know each other, and all replicas: of MODEL `r0` and on, of the other models `n.r0` and on."""
    engines = Engines()
    made: list[Site] = []
    try:
        for name in "abcde"[:count]:
            site = Site(name, engines, concurrency, take_seconds)
            made.append(site)
            await site.begin()
        for site in made:
            site.addresses.set(each.relay.address for each in made)
        for site in made:
            await until(lambda site=site: len(site.peers) == count - 1 and not site.peers.unheard)  # type: ignore[misc]
        keeper = min(made, key=lambda site: site.peers.born)
        await until(lambda: len(keeper.places._joined) == count - 1)
        for site in made:
            for model in MODELS:
                site.replica(*(f"{'' if model == MODEL else f'{model}.'}r{number}" for number in range(replicas)), model=model)
        yield made
    finally:
        for site in made:
            await site.end()
