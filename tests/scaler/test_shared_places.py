"""Gateways that share the places of replicas, over real connections: never more than the limit, none lost, evenly, whoever goes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from zerowake_proto import peers_pb2 as pb

from scaler.books.limits import ModelLimits
from tests.worlds.gateways import MODELS, Site, gateways
from tests.worlds.waiting import until


def held(*sites: Site) -> int:
    return sum(site.ledger.own("m").held for site in sites)


def works(site: Site) -> int:
    return site.ledger.own("m").in_flight


async def all_of(*tasks: asyncio.Task[None]) -> None:
    async with asyncio.timeout(30):
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("count", [2, 3])
async def test_one_place_is_shared_evenly(count: int) -> None:
    async with gateways(count) as sites:
        engines = sites[0].engines
        engines.open.clear()
        asked = [site.ask() for _ in range(20) for site in sites]
        keeper = min(sites, key=lambda site: site.peers.born)
        await until(lambda: all("m" in gateway.wants for gateway in keeper.places._book._gateways.values()))  # type: ignore[union-attr]
        engines.open.set()
        await all_of(*asked)
        assert engines.most == {"r0": 1}
        assert Counter(engines.order) == {site.name: 20 for site in sites}
        for start in range(1, 20 * count - count, count):  # they take turns
            assert len(set(engines.order[start : start + count])) == count, engines.order


@pytest.mark.parametrize("seed", range(4))
async def test_any_load(seed: int) -> None:
    chance = random.Random(seed)
    async with gateways(3, concurrency=chance.choice([1, 2, 5]), replicas=2) as sites:
        engines, limit = sites[0].engines, sites[0].ledger.limits("m").concurrency
        asked: list[asyncio.Task[None]] = []
        for _ in range(60):
            asked += [chance.choice(sites).ask(chance.choice(MODELS)) for _ in range(chance.choice([1, 1, 7]))]
            if chance.random() < 0.3:
                asked.pop(chance.randrange(len(asked))).cancel()  # a client that leaves
            await asyncio.sleep(chance.choice([0, 0, 0.002]))
        await all_of(*asked)
        assert max(engines.most.values()) <= limit
        await until(lambda: not any(works(site) for site in sites))


async def test_requests_for_several_models_come_at_once() -> None:
    """What is granted of one model, and is under way, answers nobody who asks for another."""
    async with gateways(2, concurrency=4) as sites:
        asking = max(sites, key=lambda site: site.peers.born)
        for _ in range(20):
            asked = []
            for model in ("m", "n", "m", "o"):
                asked.append(asking.ask(model))
                await asyncio.sleep(0)
            await all_of(*asked)
            for replica in ("r0", "n.r0", "o.r0"):
                asking.places.dropped(replica)  # its places go back, so that it has to ask for them again


async def test_all_places_are_used_by_whoever_asks() -> None:
    async with gateways(2, concurrency=8, replicas=2) as (a, b):
        for busy in (a, b, a):
            a.engines.open.clear()
            asked = [busy.ask() for _ in range(16)]
            await until(lambda busy=busy: works(busy) == 16)  # type: ignore[misc]
            a.engines.open.set()
            await all_of(*asked)
        assert a.engines.most == {"r0": 8, "r1": 8}


async def test_a_place_that_was_granted_is_taken_without_asking() -> None:
    async with gateways(2, concurrency=8) as (a, b):
        for site in (a, b):
            await all_of(site.ask())
        for site in (a, b):
            member = site.dispatcher.take("m")
            assert member is not None
            site.dispatcher.release(member)


async def test_one_alone_asks_nobody() -> None:
    async with gateways(1, concurrency=2) as (a,):
        a.engines.open.clear()
        asked = [a.ask() for _ in range(5)]
        await until(lambda: works(a) == 2)
        assert (a.places._book, a.places._link, held(a)) == (None, None, 3)
        a.engines.open.set()
        await all_of(*asked)
        assert a.engines.most == {"r0": 2}


async def test_one_that_comes_later_finds_what_is_used() -> None:
    async with gateways(1) as (a,), gateways(1) as (b,):
        b.engines = a.engines
        a.engines.open.clear()
        first = a.ask()
        await until(lambda: works(a) == 1)
        for site in (a, b):
            site.addresses.set([a.relay.address, b.relay.address])
            await until(lambda site=site: len(site.peers) == 1 and not site.places._alone)  # type: ignore[misc]
        await until(lambda: b.places._asks or a.places._asks)
        second = b.ask()
        third = a.ask()
        a.engines.open.set()
        await all_of(first, second, third)
        assert a.engines.most == {"r0": 1}


@pytest.mark.parametrize("goes", ["end", "die"])
@pytest.mark.parametrize("keeper", [True, False])
async def test_one_that_goes_leaves_its_places_to_the_others(goes: str, keeper: bool) -> None:
    async with gateways(3) as sites:
        going, *staying = sorted(sites, key=lambda site: site.peers.born, reverse=not keeper)
        going.engines.open.clear()
        its = going.ask()
        await until(lambda: works(going) == 1)
        asked = [site.ask() for site in staying for _ in range(5)]
        await until(lambda: held(*staying) == 10)
        assert sum(works(site) for site in staying) == 0
        its.cancel()
        await asyncio.gather(its, return_exceptions=True)
        await (going.end() if goes == "end" else going.die())
        going.engines.open.set()
        await all_of(*asked)
        assert going.engines.most == {"r0": 1}


async def test_what_a_killed_gateway_held_is_free_when_its_port_refuses() -> None:
    async with gateways(2) as (a, b):
        await all_of(b.ask())  # and has the place still
        assert b.places._held["r0"] == 1
        await b.die()
        await all_of(a.ask(), a.ask())


async def test_a_break_between_gateways_leaves_each_side_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.fleet.peers._KEEPALIVE_MS", 200)
    async with gateways(2, concurrency=4, replicas=2, take_seconds=0.5) as (a, b):
        a.engines.open.clear()
        asked = [a.ask() for _ in range(8)]
        await until(lambda: works(a) == 8)  # all there is
        asked += [b.ask() for _ in range(8)]
        await until(lambda: held(b) == 8)
        for site in (a, b):
            site.relay.silence(True)
        await until(lambda: a.places._silence.addresses and b.places._silence.addresses, within=20)
        asked += [a.ask() for _ in range(8)]
        await until(lambda: works(b) == 4)  # its share of both, while what ran goes on
        for member in asked[:6]:
            member.cancel()
        await asyncio.sleep(0)
        await until(lambda: works(a) == 4)  # and no more than that, though two would have gone on otherwise
        for site in (a, b):
            site.relay.silence(False)
        await until(lambda: len(a.peers) == 1 and len(b.peers) == 1, within=20)
        a.engines.open.set()
        await asyncio.gather(*asked, return_exceptions=True)
        a.engines.most.clear()
        await all_of(*(site.ask() for _ in range(20) for site in (a, b)))
        assert max(a.engines.most.values()) <= 4


async def test_a_break_that_ends_soon_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.fleet.peers._KEEPALIVE_MS", 200)
    async with gateways(2, take_seconds=30.0) as (a, b):
        keeper, other = sorted((a, b), key=lambda site: site.peers.born)
        a.engines.open.clear()
        first = keeper.ask()
        await until(lambda: works(keeper) == 1)
        second = other.ask()
        await until(lambda: held(other) == 1)
        for site in (a, b):
            site.relay.silence(True)
        await until(lambda: a.places._silence.addresses and b.places._silence.addresses, within=20)
        assert works(other) == 0
        for site in (a, b):
            site.relay.silence(False)
        await until(lambda: len(a.peers) == 1 and len(b.peers) == 1 and other.places._keeper == keeper.peers.instance, within=20)
        a.engines.open.set()
        await all_of(first, second)
        assert a.engines.most == {"r0": 1}


async def test_a_silent_gateway_that_kubernetes_says_is_not_ready_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.fleet.peers._KEEPALIVE_MS", 200)
    async with gateways(2, replicas=2, take_seconds=60.0) as (a, b):
        for _ in range(4):
            await all_of(b.ask(), b.ask())
        for site in (a, b):
            site.relay.silence(True)  # its node has lost its power
        await until(lambda: a.places._silence.addresses, within=20)
        a.addresses.set([a.relay.address, b.relay.address], unserving=[b.relay.address])
        a.engines.open.clear()
        asked = [a.ask() for _ in range(2)]
        await until(lambda: works(a) == 2)
        a.engines.open.set()
        await all_of(*asked)


async def test_the_limit_is_changed_while_all_wait() -> None:
    async with gateways(2, concurrency=1) as (a, b):
        a.engines.open.clear()
        asked = [site.ask() for _ in range(4) for site in (a, b)]
        await until(lambda: works(a) + works(b) == 1)
        for site in (a, b):
            site.ledger.declare("m", ModelLimits(concurrency=6))
        await until(lambda: works(a) + works(b) == 6)
        a.engines.open.set()
        await all_of(*asked)


async def test_a_peer_of_an_older_version_shares_nothing() -> None:
    async with gateways(1) as (a,):
        apply = a.peers._apply
        async with gateways(1) as (old,):
            a.peers._apply = lambda peer, update: apply(peer, _older(update))  # type: ignore[method-assign]
            a.addresses.set([a.relay.address, old.relay.address])
            await until(lambda: len(a.peers) == 1)
            await all_of(a.ask(), a.ask())


def _older(update: pb.Update) -> pb.Update:
    update.born = 0
    return update
