"""A web application answers at the address that it is given, and no longer than its block lasts."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp import web

from zerowake_shared.listening import CannotListen
from zerowake_shared.web_server import served


def app() -> web.Application:
    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    made = web.Application()
    made.add_routes([web.get("/", hello)])
    return made


async def test_it_answers_until_its_block_ends() -> None:
    async with aiohttp.ClientSession() as client:
        async with served(app(), "127.0.0.1", 0, "the test's server") as (host, port):
            response = await client.get(f"http://{host}:{port}/")
            assert await response.text() == "hello"
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get(f"http://{host}:{port}/")


async def test_an_address_that_is_taken_is_named_and_who_wanted_it() -> None:
    async with served(app(), "127.0.0.1", 0, "the first") as (host, port):
        with pytest.raises(CannotListen, match=rf"^the second cannot listen on 127\.0\.0\.1:{port}: the port is in use"):
            async with served(app(), host, port, "the second"):
                pass
