"""The gateway between a real client and real engines, over sockets."""

import asyncio
import json
import time

import aiohttp
import pytest

from tests.worlds.echo_engine import Engine
from tests.worlds.front import Answer, front
from tests.worlds.waiting import until


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
            ("POST", "/v1/x", {}, b'{"model": "nope"}', 404, "model_not_found", "the gateway's /v1/models lists"),
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
            ("GET", "/v1/models/nope", {}, None, 404, "model_not_found", "the gateway's /v1/models lists"),
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


async def test_a_lora_is_served_by_its_base_models_engine() -> None:
    async with Engine() as engine, front() as f:
        f.ledger.declare("m", f.ledger.limits("m"), ["org/sql"])
        asked = f.ask("hello", model="org/sql")
        await f.held(1)  # it is the base model's demand
        f.dispatcher.add(engine.replica())
        answer = await asked
        assert json.loads(answer.body)["model"] == "org/sql"
        assert (await f.ask("hello", model="loaded later", X_Zerowake_Model="m")).status == 200
        async with f.client.get(f"{f.url}/v1/models") as response:
            listed = [(model["id"], model.get("parent")) for model in (await response.json())["data"]]
        assert listed == [("m", None), ("org/sql", "m")]
        async with f.client.get(f"{f.url}/v1/models/org/sql") as response:
            assert (await response.json())["parent"] == "m"
        async with f.client.get(f"{f.url}/models/org/sql/x") as response:
            assert (await response.json())["target"] == "/x"


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


async def test_drain_finishes_every_answer_however_long_it_takes() -> None:
    async with Engine(held=True) as engine, front(concurrency=1) as f:
        f.dispatcher.add(engine.replica())
        stream = f.ask("one two", stream=True)
        await engine.seen.get()
        held = f.ask("held")
        await f.held(1)
        draining = asyncio.create_task(f.gateway.drain(0.05))
        refused = await held
        assert (refused.status, refused.error["code"]) == (503, "no_replica")
        assert not draining.done()
        engine.say(2)
        assert b"[DONE]" in (await stream).body
        await draining


async def test_leaving_cuts_what_is_left() -> None:
    async with Engine(held=True) as engine, front() as f:
        f.dispatcher.add(engine.replica())
        stream = f.ask("one two", stream=True)
        await engine.seen.get()
        draining = asyncio.create_task(f.gateway.drain(0))
        await until(lambda: f.gateway.draining)
        draining.cancel()
    (ended,) = await asyncio.gather(stream, return_exceptions=True)
    assert isinstance(ended, aiohttp.ClientError) or (isinstance(ended, Answer) and ended.status == 502)


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
