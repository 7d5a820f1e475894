"""What a client is told of its request's wait: by headers, by trailers of a stream whose head has gone, and never more than it waited."""

import asyncio
import math

import aiohttp
import pytest

from scaler.books.activation import Activation, Activations
from scaler.gateway.wait import Wait
from tests.worlds.echo_engine import Engine
from tests.worlds.front import Front, front
from tests.worlds.raw_client import raw_client
from tests.worlds.raw_engine import raw_engine, saying

PAGE = {"Origin": "https://page.example"}


def durations(timing: str) -> dict[str, float]:
    """Milliseconds by name, of a value that is as the standard has it."""
    found = {}
    for metric in timing.split(", "):
        name, duration = metric.split(";")
        assert name.replace("_", "").isalpha()
        assert duration.startswith("dur=")
        found[name] = float(duration.removeprefix("dur="))
    return found


def restored(f: Front) -> Activation:
    """As the agent's word of a replica leaves the activation."""
    activation = f.activations.current("m")
    assert activation is not None
    activation.made("restored")
    activation.mark("scheduled")
    activation.add("image", 1e-6)
    return activation


async def test_the_first_request_is_told_what_it_waited_for() -> None:
    async with Engine() as engine, front() as f:
        asked = f.ask()
        await f.held(1)
        activation = restored(f)
        f.dispatcher.add(engine.replica())
        headers = (await asked).headers
        assert (headers["X-Zerowake-Origin"], headers["X-Zerowake-Activation"]) == ("restored", activation.id)
        told = durations(headers["Server-Timing"])
        assert list(told) == ["zerowake", "held", "scheduled", "image", "unaccounted", "first_byte"]
        assert told["zerowake"] == pytest.approx(1000 * activation.total, abs=50)  # two looks at the clock, nothing in between
        assert math.fsum(told.values()) == pytest.approx(2 * told["zerowake"], abs=0.01)
        warm = (await f.ask()).headers
        assert warm["X-Zerowake-Origin"] == "running"
        assert not {"X-Zerowake-Activation", "Server-Timing", "Timing-Allow-Origin"} & warm.keys()


async def test_one_that_waits_for_a_place_alone_is_told_so() -> None:
    async with Engine(held=True) as engine, front(concurrency=1) as f:
        f.dispatcher.add(engine.replica())
        first = f.ask()
        await engine.seen.get()
        second = f.ask()
        await f.held(1)
        engine.say(2)
        await first
        headers = (await second).headers
        assert headers["X-Zerowake-Origin"] == "running"
        assert "X-Zerowake-Activation" not in headers
        assert list(durations(headers["Server-Timing"])) == ["zerowake", "held", "queued", "first_byte"]


def test_one_that_came_later_is_told_of_its_own_wait() -> None:
    activation = Activations().begin("m", at=100.0)
    activation.mark("held", at=100.0)
    activation.mark("scheduled", at=101.0)
    activation.add("image", 2.0, begin=101.0)
    activation.add("weights", 2.0, begin=103.0)
    activation.add("health", 0.5, begin=105.0)
    wait = Wait(102.0, 102.25, activation)
    assert wait.parts(104.0) == {"held": 0.25, "image": 0.75, "weights": 1.0, "unaccounted": 0.0}  # refused then
    activation.add("first_byte", 0.5, begin=106.0)
    wait.handed = 107.0
    assert wait.parts(107.5) == {
        "held": 0.25,
        "image": 0.75,
        "weights": 2.0,
        "health": 0.5,
        "unaccounted": 0.5,
        "queued": 1.0,
        "first_byte": 0.5,
    }
    late = Wait(106.5, 106.5, activation)  # the replica was there, and busy
    late.handed = 107.0
    assert late.parts(107.5) == {"held": 0.0, "unaccounted": 0.0, "queued": 0.5, "first_byte": 0.5}


async def test_an_engines_own_timing_stays_beside_it() -> None:
    said = b"HTTP/1.1 200 OK\r\nServer-Timing: total;dur=3\r\nContent-Length: 2\r\n\r\nhi"
    async with raw_engine(saying(said)) as engine, front() as f, raw_client(f.url) as client:
        client.get()
        await f.held(1)
        f.dispatcher.add(engine.replica())
        head = await client.head()
        assert b"\r\nServer-Timing: total;dur=3\r\n" in head
        assert b"\r\nServer-Timing: zerowake;dur=" in head
        assert b"\r\nX-Zerowake-Origin: unknown\r\n" in head  # no agent said how it was made


async def test_who_is_refused_is_told_what_was_waited_for() -> None:
    async with front(max_wait_seconds=0.05) as f, f.client.post(f"{f.url}/v1/x", json={"model": "m"}, headers=PAGE) as response:
        assert response.status == 503
        assert response.headers["X-Zerowake-Activation"] == f.activations.recent()[0].id
        assert "X-Zerowake-Origin" not in response.headers
        told = durations(response.headers["Server-Timing"])
        assert list(told) == ["zerowake", "held", "unaccounted"]
        assert told["zerowake"] >= 50
        assert response.headers["Timing-Allow-Origin"] == "*"
        readable = response.headers["Access-Control-Expose-Headers"].split(", ")
        assert {"Server-Timing", "X-Zerowake-Activation", "X-Zerowake-Origin"} < set(readable)


async def test_a_page_that_may_read_an_engines_answer_may_read_what_is_told_of_the_wait() -> None:
    said = b"HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: https://page.example\r\nContent-Length: 2\r\n\r\nhi"
    async with raw_engine(saying(said)) as engine, front() as f:
        asked = asyncio.create_task(f.client.get(f"{f.url}/models/m/x", headers=PAGE))
        await f.held(1)
        f.dispatcher.add(engine.replica())
        async with await asked as response:
            assert response.headers["Timing-Allow-Origin"] == "https://page.example"
            readable = response.headers["Access-Control-Expose-Headers"].split(", ")
            assert readable == ["X-Zerowake-Origin", "Server-Timing", "X-Zerowake-Activation"]
        async with f.client.get(f"{f.url}/models/m/x", headers=PAGE) as response:
            assert response.headers["Access-Control-Expose-Headers"] == "X-Zerowake-Origin"
            assert "Timing-Allow-Origin" not in response.headers
        async with f.client.get(f"{f.url}/models/m/x") as response:
            assert "Access-Control-Expose-Headers" not in response.headers


async def test_a_stream_with_heartbeats_is_told_at_its_end() -> None:
    async with Engine() as engine, front() as f, raw_client(f.url) as client:
        body = b'{"model": "m", "stream": true, "messages": [{"content": "a"}]}'
        fields = b"X-Zerowake-Heartbeat: 60\r\nContent-Length: %d" % len(body)
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\n" + body)
        head = await client.begun()
        activation = restored(f)
        assert head.headers["x-zerowake-activation"] == activation.id
        assert head.headers["trailer"] == "X-Zerowake-Origin, Server-Timing"
        f.dispatcher.add(engine.replica())
        end = (await client.until(b"\r\n0\r\n") + await client.until(b"\r\n\r\n")).rpartition(b"\r\n0\r\n")[2].decode()
        trailers = dict(line.split(": ", 1) for line in end.split("\r\n") if line)
        assert trailers["X-Zerowake-Origin"] == "restored"
        assert "image" in durations(trailers["Server-Timing"])


async def test_a_usual_client_reads_a_stream_with_trailers_to_its_end() -> None:
    async with Engine() as engine, front() as f, aiohttp.ClientSession() as client:
        body = {"model": "m", "stream": True, "messages": [{"content": "a"}]}
        async with client.post(f"{f.url}/v1/chat/completions", json=body, headers={"X-Zerowake-Heartbeat": "60"}) as response:
            f.dispatcher.add(engine.replica())
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        async with client.post(f"{f.url}/v1/chat/completions", json=body) as response:  # on the same connection
            assert response.headers["X-Zerowake-Origin"] == "running"
