"""Several replicas of the scaler that know each other's demand, over real connections; some in processes of their own, to be killed."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from scaler.books.demand import Demand
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.fleet.addresses import Addresses
from scaler.fleet.peers import SERVER_NAME, Peers
from scaler.keda.external_scaler import serve_external_scaler
from tests.worlds.certificates import Authority
from tests.worlds.keda_client import Keda, ref
from tests.worlds.scaler_process import scaler_process
from zerowake_shared.listening import CannotListen
from zerowake_shared.tls import TlsFiles


@dataclass
class Site:
    """One replica of the scaler: its ledger, and the addresses that it follows."""

    ledger: Ledger
    peers: Peers
    addresses: Addresses
    address: str

    async def until(self, held: int, in_flight: int = 0, model: str = "m", within: float = 10.0) -> float:
        """Waits until the demand of all gateways is so; returns how long it took."""
        began = time.monotonic()
        with self.ledger.subscribe(model) as subscription:
            async with asyncio.timeout(within):
                while not ((demand := self.ledger.demand_anywhere(model)).held == held and demand.in_flight == in_flight):
                    await subscription.changed()
        return time.monotonic() - began


@asynccontextmanager
async def site(*models: str, tls: TlsFiles | None = None, grace: float = 3.0) -> AsyncIterator[Site]:
    ledger = Ledger({name: ModelLimits() for name in models or ("m",)})
    peers, addresses = Peers(ledger, tls, grace_seconds=grace), Addresses()
    async with peers.serve("127.0.0.1:0") as address, peers.follow(addresses):
        yield Site(ledger, peers, addresses, address)


@asynccontextmanager
async def sites(count: int, **options: object) -> AsyncIterator[list[Site]]:
    """As many that all follow all, themselves included, as a headless Service would have it."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(site(**options)) for _ in range(count)]  # type: ignore[arg-type]
        for each in made:
            each.addresses.set(other.address for other in made)
        for each in made:
            await known(each, count - 1)
        yield made


async def known(each: Site, count: int) -> None:
    async with asyncio.timeout(10):
        while len(each.peers) != count or each.peers.unheard:
            await asyncio.sleep(0.005)


async def test_each_knows_the_demand_of_all() -> None:
    async with sites(3) as (a, b, c):
        a.ledger.hold("m", 5)
        b.ledger.hold("m", 5)
        b.ledger.hand_over("m", 5)
        for each in (a, b, c):
            await each.until(1, 1)
        assert (a.ledger.demand("m"), c.ledger.demand("m")) == (Demand(1, 0, 0), Demand(0, 0, 0))
        a.ledger.leave("m", 5)
        b.ledger.end("m")
        for each in (a, b, c):
            await each.until(0)


async def test_first_demand_anywhere_pushes_on_streams_of_any_replica() -> None:
    async with sites(2) as (a, b):
        pushed: asyncio.Queue[str] = asyncio.Queue()
        a.peers._on_pushed = pushed.put_nowait
        async with serve_external_scaler(b.ledger, address="127.0.0.1:0", on_pushed=b.peers.pushed) as address, Keda(address) as keda:
            watched = keda.watch(ref("m"))
            await watched.specs.get()
            asked = time.monotonic()
            a.ledger.hold("m", 0)
            assert await watched.true() - asked < 1.0
            async with asyncio.timeout(5):
                assert await pushed.get() == "m"  # the replica whose request it is hears that KEDA was told
            assert await keda.poll(ref("m")) == (1.0, True)
            a.ledger.leave("m", 0)
            await b.until(0)
            assert await keda.poll(ref("m")) == (0.0, False)


async def test_demand_of_a_model_that_is_declared_later() -> None:
    async with sites(2) as (a, b):
        told: list[str] = []
        b.ledger.on_first_demand_anywhere(told.append)
        a.ledger.declare("later", ModelLimits())
        a.ledger.hold("later", 0)
        a.ledger.hold("m", 0)
        await b.until(1)
        assert not b.ledger.knows("later")
        b.ledger.declare("later", ModelLimits())
        await b.until(1, model="later")
        assert told == ["m", "later"]
        b.ledger.withdraw("later")
        a.ledger.leave("later", 0)
        a.ledger.leave("m", 0)
        await b.until(0)
        b.ledger.declare("later", ModelLimits())
        assert b.ledger.demand_anywhere("later").pending == 0


async def test_activations_and_staging_stay_with_the_gateway_that_holds() -> None:
    async with sites(2) as (a, b):
        local: list[str] = []
        b.ledger.on_first_demand(local.append)
        a.ledger.hold("m", 0)
        await b.until(1)
        assert local == []
        b.ledger.hold("m", 0)
        assert local == ["m"]


async def test_a_killed_peer_counts_until_its_grace_is_over() -> None:
    async with scaler_process("127.0.0.1:0", 1) as other, site("model-0", grace=0.5) as here:
        here.addresses.set([other.peer])
        await other.do("hold", ["model-0"])
        await here.until(1, model="model-0")
        await other.kill()
        took = await here.until(0, model="model-0", within=5)
        assert 0.4 < took < 2.5
        assert len(here.peers) == 0


async def test_a_restarted_peers_old_numbers_vanish_with_its_first_message() -> None:
    async with site("model-0", "model-1", grace=60.0) as here:
        port = _free_port()
        async with site("model-0", "model-1") as first:
            relay = await _relay(port, first.address)
            here.addresses.set([f"127.0.0.1:{port}"])
            first.ledger.hold("model-0", 0)
            await here.until(1, model="model-0")
            relay.close()  # no clean end
            async with site("model-0", "model-1") as second:
                second.ledger.hold("model-1", 0)
                relay = await _relay(port, second.address)
                await here.until(1, model="model-1")
                await here.until(0, model="model-0", within=1)
                relay.close()


async def test_a_short_break_changes_nothing() -> None:
    async with site(grace=30.0) as here, site() as other:
        port = _free_port()
        relay = await _relay(port, other.address)
        here.addresses.set([f"127.0.0.1:{port}"])
        other.ledger.hold("m", 0)
        await here.until(1)
        seen: list[int] = []
        here.ledger.on_first_demand_anywhere(lambda model: seen.append(1))
        relay.close()
        other.ledger.hold("m", 0)  # while nobody hears it
        relay = await _relay(port, other.address)
        await here.until(2)
        assert seen == []
        relay.close()


async def test_a_peer_that_has_drained_takes_its_numbers_with_it_at_once() -> None:
    async with site(grace=60.0) as here:
        async with site() as other:
            here.addresses.set([other.address])
            other.ledger.hold("m", 0)
            await here.until(1)
        assert await here.until(0) < 2


async def test_a_peer_that_is_not_listed_any_more_counts_until_its_stream_ends() -> None:
    async with site(grace=60.0) as here:
        async with site() as other:
            here.addresses.set([other.address])
            other.ledger.hold("m", 0)
            await here.until(1)
            here.addresses.set([])  # a pod that is going away still answers what it holds
            other.ledger.hold("m", 0)
            await here.until(2)
        await here.until(0)
        async with asyncio.timeout(5):
            while here.peers._peers:
                await asyncio.sleep(0.005)


async def test_one_process_at_two_addresses_counts_once() -> None:
    async with sites(1) as (here,), site() as other:
        port = _free_port()
        relay = await _relay(port, other.address)
        here.addresses.set([here.address, other.address, f"127.0.0.1:{port}"])
        other.ledger.hold("m", 0)
        await here.until(1)
        async with asyncio.timeout(5):
            while here.peers.unheard:
                await asyncio.sleep(0.005)
        assert (here.ledger.demand_anywhere("m").held, len(here.peers)) == (1, 1)
        relay.close()


async def test_many_requests_are_few_messages() -> None:
    async with sites(2) as (a, b):
        told = 0

        def count(peer: object, update: object) -> None:
            nonlocal told
            told += 1
            apply(peer, update)  # type: ignore[arg-type]

        apply, b.peers._apply = b.peers._apply, count  # type: ignore[method-assign, assignment]
        a.ledger.hold("m", 0)
        began = time.monotonic()
        for _ in range(2000):
            a.ledger.start("m")
            if not told % 7:
                await asyncio.sleep(0)
            a.ledger.end("m")
            await asyncio.sleep(0)
        a.ledger.start("m")
        await b.until(1, 1)
        assert told <= 3 + (time.monotonic() - began) / 0.02


async def test_mutual_tls(tmp_path: Path) -> None:
    authority = Authority("zerowake")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    files = TlsFiles(*authority.issue(SERVER_NAME).write(tmp_path, "scaler"), tmp_path / "ca.crt")
    foreign = Authority("somebody else")
    (tmp_path / "foreign-ca.crt").write_bytes(foreign.certificate)
    wrong = TlsFiles(*foreign.issue(SERVER_NAME).write(tmp_path, "foreign"), tmp_path / "ca.crt")
    agent = TlsFiles(*authority.issue("zerowake-agent").write(tmp_path, "agent"), tmp_path / "ca.crt")
    async with sites(2, tls=files) as (a, b), site(tls=wrong) as stranger, site() as plain, site(tls=agent) as node:
        a.ledger.hold("m", 0)
        await b.until(1)
        for each in (stranger, plain, node):
            each.addresses.set([a.address])
            async with asyncio.timeout(10):
                while each.peers.unheard:
                    await asyncio.sleep(0.005)
            assert (len(each.peers), each.ledger.demand_anywhere("m").pending) == (0, 0)


async def test_a_renewed_certificate_counts_at_the_next_connection(tmp_path: Path) -> None:
    authority = Authority("zerowake")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    files = TlsFiles(*authority.issue(SERVER_NAME).write(tmp_path, "scaler"), tmp_path / "ca.crt")
    async with sites(2, tls=files) as (a, b):
        replaced = Authority("zerowake, renewed")
        replaced.issue(SERVER_NAME).write(tmp_path, "scaler")
        (tmp_path / "ca.crt").write_bytes(replaced.certificate)
        a.ledger.hold("m", 0)
        await b.until(1)  # the open connection goes on
        async with site(tls=files) as later:
            later.addresses.set([a.address])
            await known(later, 1)


async def test_a_connection_on_which_nothing_happens_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC servers end one on which a client asks too often whether it is alive, unless they are told how often is right."""
    monkeypatch.setattr("scaler.fleet.peers._KEEPALIVE_MS", 100)
    lost: list[object] = []
    async with sites(2) as (a, b):
        monkeypatch.setattr(b.peers, "_lost", lost.append)
        await asyncio.sleep(4.5)  # gRPC asks once a second at most, and is told off at the third time
        assert lost == []
        a.ledger.hold("m", 0)
        await b.until(1)


async def test_an_address_that_is_taken() -> None:
    async with site() as here:
        with pytest.raises(CannotListen, match=here.address):
            async with Peers(Ledger()).serve(here.address):
                pass


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class _Relay:
    def __init__(self, server: asyncio.Server, writers: set[asyncio.StreamWriter]) -> None:
        self._server = server
        self._writers = writers

    def close(self) -> None:
        """Cuts every connection, without a word of gRPC."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()


async def _relay(port: int, target: str) -> _Relay:
    """Passes bytes on, until it is closed."""
    writers: set[asyncio.StreamWriter] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, to = target.rpartition(":")
        there = await asyncio.open_connection(host, int(to))
        writers.update((writer, there[1]))
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    return _Relay(await asyncio.start_server(serve, "127.0.0.1", port), writers)
