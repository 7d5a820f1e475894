"""Demand that others post to the metrics' server: who may, what counts and for how long."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from scaler.books.demand import Elsewhere
from scaler.sources.push import Pushes, TokenFile
from scaler.sources.push_declaration import PushDeclaration
from scaler.view.metrics import SourcesCollector, serve_metrics
from tests.worlds.asked_elsewhere import AskedElsewhere, asked_elsewhere

OURS = PushDeclaration(type="push", by="b")


@dataclass
class Door:
    asked: AskedElsewhere
    client: aiohttp.ClientSession
    url: str
    token_file: Path

    async def post(self, told: Any, token: str = "hush") -> tuple[int, str]:
        body = {"data": told} if isinstance(told, str | bytes) else {"json": told}
        async with self.client.post(f"{self.url}/demand", headers={"Authorization": f"Bearer {token}"}, **body) as response:
            return response.status, await response.text()


@asynccontextmanager
async def door(folder: Path) -> AsyncIterator[Door]:
    token_file = folder / "token"
    token_file.write_text("hush\n")
    async with asked_elsewhere(OURS) as asked, aiohttp.ClientSession() as client:
        registry = CollectorRegistry()
        registry.register(SourcesCollector(asked.sources))
        route = Pushes(asked.sources, TokenFile(token_file)).route
        async with serve_metrics("127.0.0.1", 0, lambda: "", registry, [route]) as (host, port):
            yield Door(asked, client, f"http://{host}:{port}", token_file)


async def test_a_number_counts_until_the_next_one_and_for_its_time(tmp_path: Path) -> None:
    async with door(tmp_path) as made:
        asked = made.asked
        assert "source push of model m (what b post to /demand) was not heard of so far" in asked.told.unknown
        assert await made.post({"model": "m", "by": "b", "pending": 7}) == (204, "")
        assert asked.told == Elsewhere(7)
        assert await made.post({"model": "m", "by": "b", "pending": 0.5, "ttl_seconds": 1}) == (204, "")
        assert (asked.told, asked.state.up) == (Elsewhere(1), True)
        await asked.falls_silent("was not heard of lately")
        assert await made.post({"model": "m", "by": "b", "pending": 0}) == (204, "")
        assert asked.told == Elsewhere()
        async with made.client.get(f"{made.url}/metrics") as response:
            assert 'zerowake_source_pending{model="m",source="push"} 0.0' in await response.text()


async def test_who_may_tell(tmp_path: Path) -> None:
    told = {"model": "m", "by": "b", "pending": 7}
    async with door(tmp_path) as made:
        for wrong in ("", "hus", "hush2", "hüsh"):
            assert (await made.post(told, wrong))[0] == 401
        async with made.client.post(f"{made.url}/demand", json=told) as response:
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        made.token_file.write_text("new")
        assert (await made.post(told))[0] == 401
        assert made.asked.told.pending == 0
        assert (await made.post(told, "new"))[0] == 204
        made.token_file.write_text("\n")
        assert (await made.post(told, ""))[0] == 401, "an empty token lets nobody in"
        made.token_file.unlink()
        assert await made.post(told, "new") == (503, "the token of this server cannot be read; its log says why\n")
        async with made.client.get(f"{made.url}/demand") as response:
            assert response.status == 405


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"model": "m", "by": "b", "pending": -1}, "pending: Input should be greater than or equal to 0"),
        ('{"model": "m", "by": "b", "pending": NaN}', "pending: Input should be a finite number"),
        ({"model": "m", "by": "b", "pending": "7"}, "pending: Input should be a valid number"),
        ({"model": "m", "by": "b"}, "pending: Field required"),
        ({"model": "m", "by": "b", "pending": 1, "ttl_seconds": 0}, "ttl_seconds: Input should be greater than or equal to 1"),
        ({"model": "m", "by": "b", "pending": 1, "tttl": 9}, "tttl: Extra inputs are not permitted"),
    ],
)
async def test_lies_are_refused_and_the_last_value_holds(tmp_path: Path, told: Any, why: str) -> None:
    async with door(tmp_path) as made:
        await made.post({"model": "m", "by": "b", "pending": 3})
        status, said = await made.post(told)
        assert status == 400 and why in said
        assert made.asked.told == Elsewhere(3)
        assert (why in made.asked.state.fault, made.asked.state.up) == (True, False)
        assert REGISTRY.get_sample_value("zerowake_source_errors_total", {"model": "m", "source": "push"}) == 1
        await made.post({"model": "m", "by": "b", "pending": 4})
        assert (made.asked.told, made.asked.state.up) == (Elsewhere(4), True)


@pytest.mark.parametrize("body", [b"", b"\xff", "[]", "null", '{"model": {}, "by": [], "pending": 1}', "x" * 100_000])
async def test_garbage_harms_nobody(tmp_path: Path, body: Any) -> None:
    async with door(tmp_path) as made:
        assert (await made.post(body))[0] == 400
        assert made.asked.state.fault == ""


async def test_a_source_that_was_not_declared(tmp_path: Path) -> None:
    async with door(tmp_path) as made:
        for model, by in (("m", "c"), ("n", "b")):
            said = f"model {model!r} has no source of type push with by: {by!r}\n"
            assert await made.post({"model": model, "by": by, "pending": 1}) == (404, said)
