"""Pages that are asked for: how they fail."""

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from scaler.sources.page import Page
from scaler.sources.source import SourceError
from tests.worlds.ports import free_port


async def _long(_: web.Request) -> web.Response:
    return web.Response(text="x" * 2000)


async def test_an_answer_has_an_end() -> None:
    app = web.Application()
    app.router.add_get("/", _long)
    async with TestServer(app) as server:
        whole = Page(str(server.make_url("/")), 2000)
        assert await whole.get() == (200, b"x" * 2000)
        await whole.close()
        cut = Page(str(server.make_url("/")), 1999)
        with pytest.raises(SourceError, match="answers with more than 1999 bytes"):
            await cut.get()
        assert await Page(str(server.make_url("/missing")), 2000).get() == (404, b"404: Not Found")
        await cut.close()


async def test_nobody_listens() -> None:
    page = Page(f"http://127.0.0.1:{free_port()}/", 2000)
    with pytest.raises(SourceError, match="Connect call failed"):
        await page.get()
    await page.close()
