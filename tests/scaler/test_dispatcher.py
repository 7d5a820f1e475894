"""Which replica serves a request when replicas die, are drained, or come again."""

import asyncio

import aiohttp
import pytest

from scaler.gateway.dispatcher import Backend, Endpoint
from tests.worlds.echo_engine import Engine
from tests.worlds.engine_process import process
from tests.worlds.front import front
from tests.worlds.waiting import until


async def test_what_may_be_sent_twice_is_retried_elsewhere_when_its_replica_is_killed() -> None:
    async with process("held") as dying, Engine() as living, front(concurrency=9) as f:
        f.dispatcher.add(dying.replica("dying"))
        asked = [f.ask(f"n{i}", stream=bool(i % 2), Idempotency_Key=f"{i}") for i in range(8)]
        got = asyncio.create_task(f.client.get(f"{f.url}/models/m/got").__aenter__())
        await f.until(lambda demand: demand.in_flight == 9)
        held = f.ask("held")
        await f.held(1)
        f.dispatcher.add(living.replica("living"))
        await dying.kill()
        answers = await asyncio.gather(*asked, held)
        assert [answer.status for answer in answers] == [200] * 9
        assert (await got).status == 200
        assert sorted(living.seen.get_nowait() for _ in range(10)) == ["/got", "held", *(f"n{i}" for i in range(8))]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_may_have_killed_its_replica_is_not_sent_to_the_next(stream: bool) -> None:
    async with process("held") as dying, Engine(held=True) as living, front() as f:
        f.dispatcher.add(dying.replica("dying"))
        asked = f.ask("poison", stream=stream)
        await f.until(lambda demand: demand.in_flight == 1)
        await until_asked(dying.port)
        f.dispatcher.add(living.replica("living"))
        await dying.kill()
        answer = await asked
        assert (answer.status, answer.error["code"]) == (502, "replica_failed")
        assert "may have worked on the request" in answer.error["message"]
        assert living.seen.empty()


async def until_asked(port: int) -> None:
    """The engine has got a request: its kernel has, and it answers another one behind it."""
    async with aiohttp.ClientSession() as session, session.post(f"http://127.0.0.1:{port}/release", data=b"0") as response:
        assert response.status == 200


async def test_held_requests_outlive_a_killed_replica() -> None:
    """The gateway learns of the death from a refused connection, long before any agent says so."""
    async with process() as dead, Engine() as living, front(concurrency=1) as f:
        await dead.kill()
        asked = []
        for i in range(5):
            asked.append(f.ask(f"n{i}"))
            await f.held(i + 1)
        f.dispatcher.add(dead.replica("dead"))
        assert f.ledger.demand("m").in_flight == 1
        await f.held(5)  # its place is given back; nobody else is sent there
        f.dispatcher.add(living.replica("living"))
        f.dispatcher.remove("dead")
        assert [answer.text for answer in await asyncio.gather(*asked)] == [f"n{i}" for i in range(5)]
        assert living.seen.get_nowait() == "n0"  # the retried one goes first


async def test_a_second_failure_is_told() -> None:
    async with process("held") as one, process("held") as two, front(concurrency=1) as f:
        f.dispatcher.add(one.replica("one"))
        asked = f.ask(Idempotency_Key="1")
        await f.until(lambda demand: demand.in_flight == 1)
        f.dispatcher.add(two.replica("two"))
        await one.kill()
        await f.held(0)
        await f.until(lambda _: f.dispatcher.in_flight("two") == 1)
        await two.kill()
        answer = await asked
        assert (answer.status, answer.error["code"]) == (502, "replica_failed")
        assert f.ledger.demand("m").pending == 0


async def test_draining_a_replica() -> None:
    async with Engine(held=True) as old, Engine() as new, front() as f:
        f.dispatcher.add(old.replica("old"))
        asked = f.ask("x")
        await old.seen.get()
        draining = asyncio.create_task(f.dispatcher.drain("old"))
        await f.until(lambda demand: demand.replicas == 1 and not f.dispatcher.ready("m"))
        later = f.ask("later")
        await f.held(1)
        f.dispatcher.add(new.replica("new"))
        assert (await later).text == "later"
        assert not draining.done()
        old.say()
        assert (await asked).text == "x"
        await draining
        f.dispatcher.remove("old")
        await f.dispatcher.drain("old")  # gone: nothing to wait for
        assert [replica.id for replica in f.dispatcher.ready("m")] == ["new"]


async def test_the_same_replica_again_changes_nothing() -> None:
    async with Engine(held=True) as engine, Engine() as other, front() as f:
        f.dispatcher.add(engine.replica("r1"))
        asked = f.ask("x")
        await engine.seen.get()
        f.dispatcher.add(engine.replica("r1"))
        assert f.dispatcher.in_flight("r1") == 1
        f.dispatcher.add(other.replica("r1"))  # another engine under the same name: the first one finishes what it has
        assert (await f.ask("y")).text == "y"
        assert other.seen.get_nowait() == "y"
        engine.say()
        assert (await asked).text == "x"


async def test_what_is_let_go_finishes_its_answers_and_gets_no_new_ones() -> None:
    async with Engine(held=True) as old, Engine() as new, front() as f:
        f.dispatcher.add(old.replica("old"))
        stream, waiting = f.ask("one two three", stream=True), f.ask("without a first byte")
        await asyncio.gather(old.seen.get(), old.seen.get())
        f.dispatcher.let_go("old")
        f.dispatcher.let_go("old")  # twice changes nothing
        assert (f.dispatcher.ready("m"), f.dispatcher.in_flight("old"), f.ledger.demand("m").replicas) == ([], 2, 0)
        f.dispatcher.add(new.replica("new"))
        assert (await f.ask("later")).text == "later"
        old.say(4)
        answers = await asyncio.gather(stream, waiting)
        assert [word for word in ("one", "two", "three", "[DONE]") if word.encode() in answers[0].body] == ["one", "two", "three", "[DONE]"]
        assert answers[1].text == "without a first byte"
        assert old.seen.empty() and old.left.empty()
        await until(lambda: not f.dispatcher._let_go)


async def test_what_is_let_go_and_vouched_for_again_goes_on_with_what_it_has() -> None:
    async with Engine(held=True) as engine, front(concurrency=1) as f:
        f.dispatcher.add(engine.replica("r1"))
        first = f.ask("first")
        await engine.seen.get()
        f.dispatcher.let_go("r1")
        f.dispatcher.add(engine.replica("r1"))
        second = f.ask("second")
        await f.held(1)  # its one place is taken still
        engine.say(2)
        assert [(await first).text, (await second).text] == ["first", "second"]
        assert engine.most == 1


@pytest.mark.parametrize("let_go", [False, True])
async def test_a_stream_ends_at_once_when_its_engine_is_gone(let_go: bool) -> None:
    async with process("held") as engine, front() as f:
        f.dispatcher.add(engine.replica("r1"))
        await f.client.post(f"http://127.0.0.1:{engine.port}/release", data="1")
        async with f.client.post(f"{f.url}/v1/chat/completions", json=asking("one two", stream=True)) as response:
            assert b"one" in await response.content.readuntil(b"\n\n")
            if let_go:
                f.dispatcher.let_go("r1")
            await engine.kill()
            f.dispatcher.remove("r1")
            with pytest.raises(aiohttp.ClientError):
                await asyncio.wait_for(response.read(), 5)
        await f.until(lambda demand: demand.pending == 0)


async def test_a_replica_that_fails_keeps_the_answers_that_it_has_begun() -> None:
    async with Engine(held=True) as old, Engine() as new, front() as f:
        f.dispatcher.add(old.replica("old"))
        stream = f.ask("one two", stream=True)
        await old.seen.get()
        old.say()
        await until(lambda: not any(each.waits for each in f.dispatcher._members["old"].upstream._connections))
        waiting = f.ask("without a first byte")
        await old.seen.get()
        f.dispatcher.give_up("old")
        f.dispatcher.give_up("unknown")
        f.dispatcher.add(new.replica("new"))
        refused = await waiting  # its engine may have worked on it: it is not executed once more
        assert (refused.status, "does not answer its health check" in refused.error["message"]) == (502, True)
        assert (await f.ask("later")).text == "later"
        assert new.seen.get_nowait() == "later"
        assert await old.left.get() == "without a first byte"
        old.say()
        assert b"[DONE]" in (await stream).body


async def test_the_last_bytes_of_an_engine_that_ends_are_passed_on() -> None:
    """An engine that was told to end answers what it has, and is gone; its agent may be quicker than the client."""
    size = 1 << 20

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, front() as f:
        f.dispatcher.add(Backend("r1", "m", Endpoint(*server.sockets[0].getsockname())))
        async with f.client.post(f"{f.url}/v1/chat/completions", json=asking("x")) as response:
            f.dispatcher.remove("r1")
            assert len(await response.read()) == size


async def test_a_replica_that_is_wanted_again_takes_requests_again() -> None:
    async with Engine(held=True) as engine, front() as f:
        f.dispatcher.add(engine.replica("r1"))
        asked = f.ask("x")
        await engine.seen.get()
        f.dispatcher.retire("r1")
        later = f.ask("later")
        await f.held(1)
        f.dispatcher.resume("r1")
        engine.say(2)
        assert [(await asked).text, (await later).text] == ["x", "later"]
        f.dispatcher.resume("unknown")


async def test_a_replica_that_retires_keeps_no_idle_connection() -> None:
    """Its node takes each open connection for a request that is not answered yet."""
    open_now = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        open_now += 1
        while await reader.read(1 << 16):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        writer.close()
        open_now -= 1

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, front() as f:
        for end in (f.dispatcher.retire, f.dispatcher.let_go):
            f.dispatcher.add(Backend("r1", "m", Endpoint(*server.sockets[0].getsockname())))
            async with f.client.get(f"{f.url}/models/m/x") as response:
                assert await response.read() == b"x"
            assert open_now == 1
            end("r1")
            await until(lambda: open_now == 0, within=2.0)
            f.dispatcher.remove("r1")


def asking(text: str, *, stream: bool = False) -> dict[str, object]:
    return {"model": "m", "stream": stream, "messages": [{"role": "user", "content": text}]}
