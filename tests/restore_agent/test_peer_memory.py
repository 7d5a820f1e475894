"""Ranks' memory lent by gpumem and mapped by all of them, with the kernel that works in it, before and after a sleep.

Ranks are threads here; as processes that CRIU restores: test_ranks.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpumem.client import Client
from gpumem.wire.errors import NotFound
from restore_agent.workload.vllm.peer_memory import Collectives, PeerMemory
from tests.worlds.collective_on_processor import Graph, Processor, build
from tests.worlds.gpumem_server import MIB, Served, served

SIZE = 4096


@pytest.fixture(scope="module")
def lender(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("gpumem"), 160 * MIB) as server:
        yield server


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor(build(tmp_path_factory.mktemp("kernel")))


class Rank:
    def __init__(self, lender: Served, processor: Processor, number: int) -> None:
        self.client = Client(lender.socket, label=f"rank {number}")
        self.client.meet(b"first")
        self.memory = PeerMemory(self.client, number)
        self.graph = Graph(processor)
        self.mine = ctypes.create_string_buffer(bytes([number + 1]) * SIZE, SIZE)
        self.everyone = ctypes.create_string_buffer(2 * SIZE)
        self._number = number

    def join(self) -> None:
        self.memory.join(["host", "host"])
        gathers = Collectives(self.memory.addresses, self._number, self.graph.capture)
        assert gathers.gather(ctypes.addressof(self.mine), ctypes.addressof(self.everyone), SIZE)

    def wake(self, meeting: bytes) -> None:
        self.client.resume(meeting=meeting)


@pytest.fixture
def ranks(lender: Served, processor: Processor) -> Iterator[tuple[Rank, Rank]]:
    both = Rank(lender, processor, 0), Rank(lender, processor, 1)
    yield both
    for rank in both:
        rank.client.close()


def at_once(ranks: tuple[Rank, Rank], step: str, *arguments: object) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda rank: getattr(rank, step)(*arguments), ranks))


def replayed(ranks: tuple[Rank, Rank]) -> set[bytes]:
    for rank in ranks:
        ctypes.memset(rank.everyone, 0, 2 * SIZE)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda rank: rank.graph.replay(), ranks))
    return {rank.everyone.raw for rank in ranks}


def test_what_was_captured_goes_on_after_a_sleep(ranks: tuple[Rank, Rank]) -> None:
    at_once(ranks, "join")
    expected = {b"\1" * SIZE + b"\2" * SIZE}
    assert replayed(ranks) == replayed(ranks) == expected
    before = [rank.memory.addresses for rank in ranks]
    for number in range(3):
        for rank in ranks:
            rank.client.quiesce()
        at_once(ranks, "wake", b"meeting %d" % number)
        assert replayed(ranks) == replayed(ranks) == expected
    assert [rank.memory.addresses for rank in ranks] == before


def test_each_rank_knows_its_own_place_among_the_addresses(ranks: tuple[Rank, Rank]) -> None:
    at_once(ranks, "join")
    one, two = (rank.memory for rank in ranks)
    assert one.addresses[0] == one._ranges[0].address and two.addresses[1] == two._ranges[0].address
    assert len({*one.addresses, *two.addresses}) == 4, "in one process they are mapped twice"


def test_closed_nothing_of_it_is_lent(lender: Served, processor: Processor) -> None:
    rank = Rank(lender, processor, 0)
    rank.client.meet(b"of nobody else")
    with pytest.raises(NotFound):
        rank.client.join("collectives of rank 1", "host", wait=0.05)
    rank.memory.close()
    assert not [lease for lease in lender.status().leases if lease.label == "rank 0"]
    rank.client.close()
