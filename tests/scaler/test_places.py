"""The book of places: never more than there are, all of them used, and fairly."""

from __future__ import annotations

import random
from collections import deque

import pytest

from scaler.books.places import Granted, PlaceBook, Recalled


class Gateway:
    """One that works on requests in its places, and gives places back as it is asked to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.line = 0
        self.held: dict[str, int] = {}
        self.works: deque[str] = deque()
        self.firm: dict[str, int] = {}
        self.kind: dict[str, int] = {}
        self.done = 0


class World:
    def __init__(self, gateways: int, replicas: int, concurrency: int) -> None:
        self.concurrency = concurrency
        self.replicas = [f"r{number}" for number in range(replicas)]
        self.gateways = {name: Gateway(name) for name in "abcdef"[:gateways]}
        self.book = PlaceBook(lambda model: self.concurrency)
        for name in self.gateways:
            self.book.join(name, ())

    def asks(self, name: str, requests: int = 1) -> None:
        self.gateways[name].line += requests
        self.turn(self.gateways[name])

    def ends(self, name: str) -> None:
        """The oldest request there has ended."""
        gateway = self.gateways[name]
        gateway.works.popleft()
        gateway.done += 1
        self.turn(gateway)

    def turn(self, gateway: Gateway) -> None:
        self.give_back(gateway, gateway.firm)
        while gateway.line and (replica := self.free(gateway)):
            gateway.line -= 1
            gateway.works.append(replica)
        self.book.want(gateway.name, "m", gateway.line, self.replicas)
        self.give_back(gateway, gateway.kind)
        self.settle()

    def give_back(self, gateway: Gateway, asked: dict[str, int]) -> None:
        for replica, count in list(asked.items()):
            back = min(count, gateway.held.get(replica, 0) - gateway.works.count(replica))
            if back > 0:
                gateway.held[replica] -= back
                for each in (gateway.firm, gateway.kind):
                    each[replica] = max(0, each.get(replica, 0) - back)
                self.book.give_back(gateway.name, replica, back)

    def free(self, gateway: Gateway) -> str:
        return next((each for each, count in gateway.held.items() if count > gateway.works.count(each) + gateway.firm.get(each, 0)), "")

    def settle(self) -> None:
        for said in self.book.settle("m"):
            gateway = self.gateways[said.gateway]
            if isinstance(said, Granted):
                gateway.held[said.replica] = gateway.held.get(said.replica, 0) + 1
            else:
                asked = gateway.firm if said.firm else gateway.kind
                asked[said.replica] = asked.get(said.replica, 0) + 1
            self.turn(gateway)
        for replica in self.replicas:
            assert sum(each.works.count(replica) for each in self.gateways.values()) <= self.concurrency

    @property
    def working(self) -> int:
        return sum(len(each.works) for each in self.gateways.values())


def test_places_that_are_free_are_granted_at_once_and_kept() -> None:
    world = World(2, 1, 8)
    world.asks("a")
    world.ends("a")
    assert world.book.held("a") == {"r0": 1}
    assert world.book.settle("m") == []
    world.asks("b", 7)
    assert world.working == 7  # and nobody was asked for anything


def test_an_idle_gateway_keeps_nothing_that_another_waits_for() -> None:
    world = World(2, 1, 8)
    world.asks("a", 8)
    for _ in range(8):
        world.ends("a")
    world.asks("b", 8)
    assert (world.working, world.book.held("a")) == (8, {})


def test_one_place_goes_round() -> None:
    world = World(3, 1, 1)
    for name in world.gateways:
        world.asks(name, 20)
    order = []
    while world.working:
        (busy,) = [each for each in world.gateways.values() if each.works]
        order.append(busy.name)
        world.ends(busy.name)
    assert len(order) == 60
    assert all(set(order[start : start + 3]) == set("abc") for start in range(3, 57, 3))


def test_a_late_one_gets_its_share_of_what_another_has_taken_whole() -> None:
    world = World(2, 2, 4)
    world.asks("a", 100)
    world.asks("b", 100)
    assert world.working == 8
    for _ in range(4):
        world.ends("a")
    assert [len(world.gateways[name].works) for name in "ab"] == [4, 4]


def test_one_that_has_none_gets_one_from_whoever_is_never_idle() -> None:
    world = World(3, 1, 2)
    world.asks("a")
    world.asks("b")
    world.asks("a")  # its own next one: b is asked kindly
    world.asks("c")
    world.ends("b")
    world.asks("b")
    assert len(world.gateways["c"].works) == 1


def test_the_limit_is_lowered() -> None:
    world = World(2, 1, 4)
    world.asks("a", 2)
    world.asks("b", 2)
    world.concurrency = 1
    for said in world.book.settle("m"):
        assert isinstance(said, Recalled)
        world.gateways[said.gateway].firm["r0"] = world.gateways[said.gateway].firm.get("r0", 0) + 1
    for name in "abab":
        if world.gateways[name].works:
            world.gateways[name].works.popleft()
            world.give_back(world.gateways[name], world.gateways[name].firm)
    assert sum(world.book.held("a").values()) + sum(world.book.held("b").values()) == 1


def test_a_gateway_that_is_gone_leaves_its_places() -> None:
    world = World(2, 1, 1)
    world.asks("a")
    world.asks("b")
    world.book.leave("a")
    del world.gateways["a"]
    world.settle()
    assert world.working == 1


def test_what_is_withheld_is_not_granted() -> None:
    book = PlaceBook(lambda model: 4, lambda replica, places: (3, 0))
    book.join("a", [])
    book.want("a", "m", 4, ["r0"])
    assert book.settle("m") == [Granted("a", "m", "r0")]


def test_a_model_that_is_not_known_yet_waits() -> None:
    known: list[int] = []
    book = PlaceBook(lambda model: known[0] if known else None)
    book.join("a", [("m", "r0", 1)])
    book.want("a", "m", 1, ["r0"])
    assert book.settle("m") == []
    known.append(2)
    assert book.settle("m") == [Granted("a", "m", "r0")]


@pytest.mark.parametrize("seed", range(60))
def test_any_day(seed: int) -> None:
    """Whatever happens in whatever order: never too many, nothing lost, nobody starves, and all is free again at the end."""
    chance = random.Random(seed)
    world = World(chance.randint(1, 4), chance.randint(1, 3), chance.choice([1, 1, 2, 3, 8]))
    asked = dict.fromkeys(world.gateways, 0)
    for _ in range(300):
        name = chance.choice(list(world.gateways))
        if chance.random() < 0.5:
            requests = chance.choice([1, 1, 2, 9])
            asked[name] += requests
            world.asks(name, requests)
        elif world.gateways[name].works:
            world.ends(name)
        held = sum(each.line for each in world.gateways.values())
        idle = sum(sum(each.held.values()) - len(each.works) for each in world.gateways.values())
        assert not (held and idle), "somebody waits while a place is idle"
        assert not held or world.working == len(world.replicas) * world.concurrency
    while world.working:
        busy = [each.name for each in world.gateways.values() if each.works]
        world.ends(chance.choice(busy))
    assert {name: each.done for name, each in world.gateways.items()} == asked
