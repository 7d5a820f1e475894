"""Replicas at which nothing answers, alone and with all of their node; and those that are looked at because their agent is silent."""

from __future__ import annotations

import asyncio

import pytest

from scaler.books.demand import Demand
from scaler.gateway.dispatcher import Backend, Endpoint
from tests.worlds.black_hole import black_hole
from tests.worlds.echo_engine import Engine
from tests.worlds.front import Front, front
from tests.worlds.waiting import until


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaler.gateway.upstream._CONNECT_SECONDS", 0.3)


def replica(name: str, port: int, node: str) -> Backend:
    return Backend(name, "m", Endpoint("127.0.0.1", port), node)


def serving(f: Front) -> set[str]:
    return {name for name, member in f.dispatcher._members.items() if member.takes_requests}


async def test_a_node_is_left_at_its_first_connection_that_is_not_answered() -> None:
    with black_hole() as dead:
        async with Engine() as engine, front(concurrency=1) as f:
            nodes: list[str] = []
            f.dispatcher.suspects.on_unreachable(nodes.append)
            f.dispatcher.add(replica("a", dead, "n1"))
            f.dispatcher.add(replica("b", dead, "n1"))
            asked = f.ask("first")
            await until(lambda: nodes)
            assert serving(f) == set()  # the second one of that node was not tried by a request
            f.dispatcher.add(replica("c", engine.port, "n2"))
            assert (await asked).status == 200
            assert [(await f.ask("next")).status for _ in range(3)] == [200] * 3
            assert nodes == ["n1"]


async def test_others_of_the_node_that_do_answer_serve_again_at_once() -> None:
    with black_hole() as dead:
        async with Engine() as engine, front(concurrency=1) as f:
            f.dispatcher.add(replica("a", dead, "n1"))
            asked = f.ask("first")
            await f.until(lambda demand: demand.in_flight == 1)
            f.dispatcher.add(replica("b", engine.port, "n1"))
            f.dispatcher.add(replica("elsewhere", engine.port, "n2"))
            assert (await asked).status == 200
            await until(lambda: serving(f) == {"b", "elsewhere"})


async def test_replicas_that_cannot_be_reached_are_not_counted_on() -> None:
    with black_hole() as dead:
        async with front() as f:
            first: list[str] = []
            f.dispatcher.add(replica("a", dead, "n1"))
            f.ledger.on_first_demand(first.append)
            asked = f.ask()
            await until(lambda: first)  # as if there were none: another one is asked for
            demand = f.ledger.demand("m")
            assert (demand.replicas, demand.unreachable, demand.load(8.0)) == (1, 1, 16.0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)


async def test_one_that_refuses_is_on_a_node_that_lives() -> None:
    async with Engine() as engine, front() as f:
        port = engine.port
        await engine.__aexit__(None, None, None)
        f.dispatcher.add(replica("a", port, "n1"))
        async with Engine() as other:
            f.dispatcher.add(replica("b", other.port, "n1"))
            asked = [f.ask(f"n{number}") for number in range(4)]
            assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 4
            assert serving(f) == {"b"}
            assert f.ledger.demand("m").unreachable == 0
            async with Engine(port=port):
                await until(lambda: serving(f) == {"a", "b"})


async def test_a_silent_nodes_replicas_serve_for_as_long_as_they_answer() -> None:
    with black_hole() as dead:
        async with Engine(held=True) as engine, front() as f:
            f.dispatcher.add(replica("lives", engine.port, "n1"))
            f.dispatcher.add(replica("cut off", dead, "n2"))
            for _ in range(2):
                f.dispatcher.suspects.doubt("n1")
                assert "lives" in serving(f)
            f.dispatcher.suspects.doubt("n2")
            f.dispatcher.suspects.doubt("unknown")
            f.dispatcher.suspects.doubt("")
            assert serving(f) == {"lives", "cut off"}
            await until(lambda: serving(f) == {"lives"})
            assert f.ledger.demand("m") == Demand(0, 0, 2, unreachable=1)


async def test_one_that_is_let_go_is_tried_no_more() -> None:
    with black_hole() as dead:
        async with front() as f:
            f.dispatcher.add(replica("a", dead, "n1"))
            f.dispatcher.suspects.doubt("n1")
            await until(lambda: f.ledger.demand("m").unreachable == 1)
            f.dispatcher.remove("a")
            assert f.ledger.demand("m") == Demand(0, 0, 0)
            await until(lambda: not f.dispatcher._closing)
