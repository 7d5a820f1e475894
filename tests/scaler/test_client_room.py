"""More clients than there are descriptors for: who is let in, who has to leave, and what they are told."""

import asyncio
import logging
import resource

import pytest

from scaler.gateway.client_room import ClientRoom
from tests.worlds.echo_engine import Engine
from tests.worlds.front import front
from tests.worlds.raw_client import raw_client
from tests.worlds.virtual_time import StandingClock
from tests.worlds.waiting import until


class Client:
    def __init__(self) -> None:
        self.ended = False

    def make_room(self) -> None:
        self.ended = True


def test_of_those_without_a_request_the_one_that_has_rested_longest_makes_room() -> None:
    room = ClientRoom(3)
    first, second, third, fourth, fifth, sixth = (Client() for _ in range(6))
    assert all(room.enter(client) for client in (first, second, third))
    room.asks(first)
    assert room.enter(fourth)
    assert (first.ended, second.ended, third.ended) == (False, True, False)
    room.asks(third)
    room.rests(first)  # later than the fourth has come
    assert room.enter(fifth)
    assert (first.ended, fourth.ended) == (False, True)
    room.asks(first)
    room.asks(fifth)
    assert not room.enter(sixth)
    assert len(room) == 4
    room.leave(sixth)
    room.leave(first)
    assert room.enter(Client())
    assert not any(client.ended for client in (first, third, fifth, sixth))


def test_one_that_has_left_rests_no_more() -> None:
    room = ClientRoom(1)
    client = Client()
    room.enter(client)
    room.asks(client)
    room.leave(client)
    room.rests(client)
    assert room.enter(Client())
    assert (client.ended, len(room)) == (False, 1)


def test_the_log_says_once_a_minute_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    clock = StandingClock(5.0)
    room = ClientRoom(1, clock)
    for at in (5.0, 6.0, 64.0, 66.0):
        clock.moment = at
        room.enter(Client())
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "raise the limit (ulimit -n, LimitNOFILE" in caplog.text


def test_descriptors_are_left_for_others() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert ClientRoom.of_process().limit == hard * 3 // 4
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_idle_clients_and_half_heads_make_room_for_whoever_asks() -> None:
    room = ClientRoom(20)
    async with Engine() as engine, front(room=room) as f, asyncio.timeout(20):
        f.dispatcher.add(engine.replica())
        streams = [await asyncio.open_connection(*f.url.removeprefix("http://").split(":")) for _ in range(200)]
        for number, (_, writer) in enumerate(streams):
            if number % 2:
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        async with raw_client(f.url) as client:
            client.get("/models/m/x")
            assert (await client.answer()).status == 200
        assert len(room) <= 20
        ended = await asyncio.gather(*(reader.read() for reader, _ in streams[:150]), return_exceptions=True)
        assert all(found == b"" or isinstance(found, ConnectionError) for found in ended)
        for _, writer in streams:
            writer.transport.abort()
        await until(lambda: not len(room), "nobody is counted who has left")


async def test_where_all_have_requests_under_way_a_new_one_is_told_and_let_in_as_soon_as_one_has_its_answer() -> None:
    async with Engine(held=True) as engine, front(room=ClientRoom(8), concurrency=100) as f, asyncio.timeout(20):
        f.dispatcher.add(engine.replica())
        asked = [f.ask(str(number)) for number in range(8)]
        for _ in asked:
            await engine.seen.get()
        async with raw_client(f.url) as client:
            client.get("/models/m/x")
            answer = await client.answer()
            assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "too_many_connections", "5")
            assert await client.rest() == b""
        async with raw_client(f.url), raw_client(f.url) as another:  # one too many even to be told
            another.get("/models/m/x")
            assert await another.rest() == b""
        engine.say(8)
        assert [(await answer).status for answer in asked] == [200] * 8
        engine.say()
        async with raw_client(f.url) as client:
            client.get("/models/m/x")
            assert (await client.answer()).status == 200
