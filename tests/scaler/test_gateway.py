"""The gateway between a real client and real engines, over sockets."""

import asyncio
import gzip
import json
import socket
import struct
import time

import aiohttp
import pytest

from tests.worlds.echo_engine import Engine
from tests.worlds.front import front


async def test_passes_the_request_on_untouched() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        body = gzip.compress(b"anything \x00\xff")
        headers = {
            "X-Zerowake-Model": "m",
            "Content-Encoding": "gzip",
            "Content-Type": "application/octet-stream",
            "Accept-Encoding": "br;q=0.5",
            "Cookie": "a=b",
            "Authorization": "Bearer secret",
            "User-Agent": "me",
            "Connection": "keep-alive, X-Mine",
            "X-Mine": "for the gateway's connection only",
            "TE": "trailers",
            "X-Status": "418",
        }
        url = aiohttp.client.URL(f"{f.url}/a/%2F/b%20c/?q=%C3%A9&q=%2b", encoded=True)
        async with f.client.put(url, data=body, headers=headers, skip_auto_headers=["Accept"]) as response:
            seen = await response.json()
            assert response.status == 418
            assert response.headers["X-Engine"] == "yes"
        assert seen["method"] == "PUT"
        assert seen["target"] == "/a/%2F/b%20c/?q=%C3%A9&q=%2b"
        assert bytes.fromhex(seen["body"]) == body
        assert dict(seen["headers"]) == {
            "Host": f.url.removeprefix("http://"),
            "X-Zerowake-Model": "m",
            "Content-Encoding": "gzip",
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(body)),
            "Accept-Encoding": "br;q=0.5",
            "Cookie": "a=b",
            "Authorization": "Bearer secret",
            "User-Agent": "me",
            "X-Status": "418",
        }


async def test_adds_no_header_to_a_bare_request() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        reader, writer = await asyncio.open_connection(*f.url.removeprefix("http://").split(":"))
        writer.write(b"GET /models/m/bare HTTP/1.0\r\n\r\n")
        answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert answer[0].startswith(b"HTTP/1.0 200 ")
        told = json.loads(answer[2])
        assert told["target"] == "/bare"
        assert [name for name, _ in told["headers"]] == ["Host"]  # HTTP/1.1 demands one; it is the engine's own


async def test_an_answer_without_a_body_stays_one() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        async with f.client.head(f"{f.url}/models/m/x") as response:
            assert (response.status, await response.read()) == (200, b"")
            assert int(response.headers["Content-Length"]) > 0
        async with f.client.get(f"{f.url}/models/m/x", headers={"X-Status": "204"}) as response:
            assert (response.status, await response.read()) == (204, b"")


async def test_finds_the_model_in_body_then_header_then_path() -> None:
    async with Engine() as one, Engine() as two, front(concurrency=1) as f:
        f.ledger.declare("other/model", f.ledger.limits("m"))
        f.dispatcher.add(one.replica("r1", "m"))
        f.dispatcher.add(two.replica("r2", "other/model"))
        cases = [
            ("/x", {}, {"model": "m"}, one),
            ("/x", {"X-Zerowake-Model": "other/model"}, {}, two),
            ("/models/other%2Fmodel/x", {}, {}, two),
            ("/models/other%2Fmodel/x", {"X-Zerowake-Model": "m"}, {"model": "other/model"}, two),
            ("/models/other%2Fmodel/x", {"X-Zerowake-Model": "m"}, {}, one),
            ("/models/m/x", {}, {"model": "what the engine calls it"}, one),
        ]
        for path, headers, body, engine in cases:
            async with f.client.post(f.url + path, headers=headers, json=body) as response:
                assert response.status == 200, await response.text()
                assert (await response.json())["target"] == "/x"
            assert engine.seen.get_nowait() == "/x"


async def test_says_what_is_wrong_with_a_request() -> None:
    async with front(body_bytes=1000) as f:
        cases = [
            ("POST", "/v1/x", {}, b'{"model": "nope"}', 404, "model_not_found", "known models: m"),
            ("POST", "/v1/x", {}, b'{"model": 3}', 400, "bad_model", "must be a string"),
            ("POST", "/v1/x", {}, b"not json", 400, "model_missing", "X-Zerowake-Model"),
            ("GET", "/v1/x", {}, None, 400, "model_missing", "X-Zerowake-Model"),
            ("POST", "/v1/x", {}, b'{"model": "m", "x": "%s"}' % (b"y" * 1000), 413, "body_too_large", "X-Zerowake-Model"),
            ("POST", "/v1/x", {"X-Zerowake-Priority": "urgent"}, b'{"model": "m"}', 400, "bad_priority", "X-Zerowake-Priority"),
            (
                "POST",
                "/v1/x",
                {"X-Zerowake-Heartbeat": "nan"},
                b'{"model": "m", "stream": true}',
                400,
                "bad_heartbeat",
                "X-Zerowake-Heartbeat",
            ),
            ("GET", "/v1/models/nope", {}, None, 404, "model_not_found", "known models: m"),
            ("GET", "/models/", {}, None, 404, "model_not_found", "/models/<name>"),
        ]
        for method, path, headers, body, status, code, message in cases:
            async with f.client.request(method, f.url + path, headers=headers, data=body) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (status, code)
                assert message in error["message"]
                assert set(error) == {"message", "type", "param", "code"}


async def test_lists_the_models() -> None:
    async with Engine() as engine, front() as f:
        f.ledger.declare("org/other", f.ledger.limits("m"))
        f.dispatcher.add(engine.replica())
        async with f.client.get(f"{f.url}/v1/models") as response:
            listed = await response.json()
        assert listed["object"] == "list"
        assert [(model["id"], model["object"]) for model in listed["data"]] == [("m", "model"), ("org/other", "model")]
        async with f.client.get(f"{f.url}/v1/models/org/other") as response:
            assert (await response.json())["id"] == "org/other"
        async with f.client.get(f"{f.url}/models/m/v1/models") as response:
            assert (await response.json())["target"] == "/v1/models"  # the engine's own list


async def test_each_piece_of_an_answer_arrives_while_the_next_is_held_back() -> None:
    async with Engine(held=True) as engine, front() as f:
        f.dispatcher.add(engine.replica())
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "one two three"}]}
        engine.say()
        async with asyncio.timeout(10), f.client.post(f"{f.url}/v1/chat/completions", json=body) as response:
            for word in ("one", "two", "three"):
                line = await response.content.readuntil(b"\n\n")
                assert json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == word
                engine.say()
            assert await response.content.read() == b"data: [DONE]\n\n"
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"


async def test_a_streamed_body_reaches_the_engine_before_its_end() -> None:
    async with Engine() as engine, front(body_bytes=1000) as f:
        f.dispatcher.add(engine.replica())
        answered: asyncio.Queue[int] = asyncio.Queue()

        async def upload():  # type: ignore[no-untyped-def]
            for size in (3, 5000, 1):
                yield b"x" * size
                told = 0
                async with asyncio.timeout(10):
                    while told < size:  # each chunk is sent only after the engine has told of the one before
                        told += await answered.get()

        async with asyncio.timeout(10), f.client.post(f"{f.url}/models/m/upload", data=upload()) as response:
            async for line in response.content:
                answered.put_nowait(int(line))


async def test_expect_continue_is_answered() -> None:
    async with Engine() as engine, front() as f:
        f.dispatcher.add(engine.replica())
        async with asyncio.timeout(10), f.client.post(f"{f.url}/x", json={"model": "m"}, expect100=True) as response:
            assert "Expect" not in dict((await response.json())["headers"])


async def test_a_held_request_is_answered_when_a_replica_comes() -> None:
    async with Engine(held=True) as engine, front() as f:
        first: list[str] = []
        f.ledger.on_first_demand(lambda model: first.append(f"{model} {f.activations.current(model) is not None}"))
        asked = [f.ask(f"n{i}") for i in range(20)]
        await f.held(20)
        assert first == ["m True"]
        f.dispatcher.add(engine.replica())
        for _ in range(8):  # the model's concurrency
            await engine.seen.get()
        assert (f.ledger.demand("m").held, f.dispatcher.in_flight("r1")) == (12, 8)
        engine.say(20)
        assert [answer.text for answer in await asyncio.gather(*asked)] == [f"n{i}" for i in range(20)]
        assert engine.most == 8
        demand = f.ledger.demand("m")
        assert (demand.pending, demand.replicas, f.ledger.held_bytes("m")) == (0, 1, 0)


async def test_an_activation_accounts_for_its_time() -> None:
    async with Engine() as engine, front() as f:
        asked = f.ask()
        await f.held(1)
        activation = f.activations.current("m")
        assert activation is not None
        activation.add("image", 1e-6)
        f.dispatcher.add(engine.replica())
        await asked
        assert f.activations.current("m") is None
        assert f.activations.recent() == [activation]
        assert activation.outcome == "served"
        assert list(activation.phases) == ["held", "image", "first_byte", "unaccounted"]
        assert sum(activation.phases.values()) == pytest.approx(activation.total)
        await f.ask()  # a replica is there: nothing is activated
        assert len(f.activations.recent()) == 1


async def test_bounds() -> None:
    async with front(max_requests=2, max_bytes=500) as f:
        asked = [f.ask("x" * 10), f.ask("y" * 10)]
        await f.held(2)
        refused = await f.ask("z")
        assert (refused.status, refused.error["code"], refused.error["type"]) == (429, "too_many_requests", "rate_limit_error")
        assert int(refused.headers["Retry-After"]) > 0
        asked[0].cancel()
        await f.held(1)
        refused = await f.ask("z" * 400)
        assert (refused.status, refused.error["code"]) == (429, "too_many_bytes")
        async with Engine() as engine:
            f.dispatcher.add(engine.replica())
            assert (await asked[1]).text == "y" * 10


async def test_no_replica_in_time() -> None:
    async with front(max_wait_seconds=0.05) as f:
        refused = await f.ask()
        assert (refused.status, refused.error["code"]) == (503, "no_replica")
        assert int(refused.headers["Retry-After"]) > 0
        f.ledger.report_failure("m", "the snapshot is corrupt: pages-1.img")
        refused = await f.ask()
        assert "the snapshot is corrupt: pages-1.img" in refused.error["message"]
        assert f.activations.current("m") is None
        assert [activation.outcome for activation in f.activations.recent()] == ["abandoned"] * 2


async def test_a_client_that_leaves_while_held_is_not_passed_on() -> None:
    async with Engine() as engine, front(concurrency=1) as f:
        gone, stays = f.ask("gone"), f.ask("stays")
        await f.held(2)
        gone.cancel()
        await f.held(1)
        f.dispatcher.add(engine.replica())
        assert (await stays).text == "stays"
        assert engine.seen.get_nowait() == "stays"
        assert engine.seen.empty()


async def test_a_client_that_leaves_in_flight_ends_the_engines_work() -> None:
    async with Engine(held=True) as engine, front() as f:
        f.dispatcher.add(engine.replica())
        before, during = f.ask("before the first byte"), f.ask("in the middle", stream=True)
        assert {await engine.seen.get(), await engine.seen.get()} == {"before the first byte", "in the middle"}
        before.cancel()
        async with asyncio.timeout(10):
            assert await engine.left.get() == "before the first byte"
            engine.say()
            during.cancel()
            assert await engine.left.get() == "in the middle"
        await f.until(lambda demand: demand.pending == 0)
        assert f.dispatcher.in_flight("r1") == 0


async def test_a_client_that_leaves_with_its_body_unread_is_noticed() -> None:
    """Its connection is full, so nobody reads from it while it is held: only the kernel knows that it has gone."""
    async with Engine() as engine, front() as f:
        host, port = f.url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, (host, int(port)))
            await loop.sock_sendall(client, b"POST /models/m/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
            await f.held(1)
            with pytest.raises(BlockingIOError):  # until nobody takes any more
                while True:
                    client.send(b"x" * 2**20)
                    await asyncio.sleep(0)  # the gateway's turn
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets the connection
        await f.held(0)
        f.dispatcher.add(engine.replica())
        assert (await f.ask()).status == 200
        assert engine.seen.get_nowait() == "hello"


async def test_fair_between_tenants_and_priority_first() -> None:
    async with Engine() as engine, front(concurrency=1) as f:
        order = []
        for tenant, priority, count in (("a", "normal", 4), ("b", "normal", 2), ("c", "low", 1), ("d", "high", 2)):
            for i in range(count):
                order.append(f.ask(f"{tenant}{i}", X_Zerowake_Tenant=tenant, X_Zerowake_Priority=priority))
                await f.held(len(order))
        order.append(f.ask("k0", Authorization="Bearer one"))
        await f.held(len(order))
        f.dispatcher.add(engine.replica())
        await asyncio.gather(*order)
        served = [engine.seen.get_nowait() for _ in order]
        assert served == ["d0", "d1", "a0", "b0", "k0", "a1", "b1", "a2", "a3", "c0"]


async def test_a_burst_spreads_over_replicas() -> None:
    async with Engine(held=True) as one, Engine(held=True) as two, front(concurrency=2) as f:
        asked = [f.ask(f"n{i}") for i in range(4)]
        await f.held(4)
        f.dispatcher.add(one.replica("r1"))
        f.dispatcher.add(two.replica("r2"))
        async with asyncio.timeout(10):
            for engine in (one, one, two, two):
                await engine.seen.get()
        one.say(2)
        two.say(2)
        assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 4


async def test_heartbeats_while_held() -> None:
    async with Engine() as engine, front() as f:
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "one two"}]}
        headers = {"X-Zerowake-Heartbeat": "0.1"}
        async with asyncio.timeout(10), f.client.post(f"{f.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert (response.status, response.content_type) == (200, "text/event-stream")
            for _ in range(3):
                assert await response.content.readuntil(b"\n\n") == b": waiting\n\n"
            f.dispatcher.add(engine.replica())
            rest = (await response.content.read()).replace(b": waiting\n\n", b"")
        assert [event[:6] for event in rest.split(b"\n\n")] == [b"data: ", b"data: ", b"data: ", b""]
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_errors_after_a_heartbeat_are_events() -> None:
    async with Engine() as engine, front(max_wait_seconds=0.05) as f:
        answer = await f.ask(stream=True, X_Zerowake_Heartbeat="10")
        assert answer.status == 200
        comment, event, end = answer.body.replace(b"\n\n\n\n", b"\n\n").split(b"\n\n")
        assert (comment, end) == (b": waiting", b"")
        assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "no_replica"
        f.ledger.declare("m", type(f.ledger.limits("m"))())
        asked = f.ask("fail", stream=True, X_Zerowake_Heartbeat="10")
        await f.held(1)
        f.dispatcher.add(engine.replica())
        event = (await asked).body.split(b"data: ")[1]
        assert json.loads(event)["error"]["code"] == "told"


async def test_drain_lets_requests_finish() -> None:
    async with Engine(held=True) as engine, front(concurrency=1) as f:
        f.dispatcher.add(engine.replica())
        flying = f.ask("flying")
        await engine.seen.get()
        held = f.ask("held")
        await f.held(1)
        draining = asyncio.create_task(f.gateway.drain(10))
        await asyncio.sleep(0)  # its first step
        assert f.gateway.draining
        async with aiohttp.ClientSession() as late:
            with pytest.raises(aiohttp.ClientConnectorError):
                await late.get(f"{f.url}/v1/models")
        engine.say(2)
        answers = [await flying, await held]
        assert [(answer.text, answer.headers["Connection"]) for answer in answers] == [("flying", "close"), ("held", "close")]
        await draining


async def test_drain_refuses_what_it_cannot_answer() -> None:
    async with front() as f:
        asked = f.ask()
        await f.held(1)
        begun = time.monotonic()
        await f.gateway.drain(0.05)
        assert time.monotonic() - begun < 5
        refused = await asked
        assert (refused.status, refused.error["code"]) == (503, "no_replica")
        assert "shutting down" in refused.error["message"]


async def test_withdrawing_a_model_refuses_its_held_requests() -> None:
    async with front() as f:
        asked = f.ask()
        await f.held(1)
        f.ledger.withdraw("m")
        refused = await asked
        assert (refused.status, "withdrawn" in refused.error["message"]) == (503, True)
        assert (await f.ask()).status == 404
