"""Pages that are asked for: how they fail."""

from collections.abc import Sequence

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


async def _elsewhere(request: web.Request) -> web.Response:
    raise web.HTTPFound(f"http://127.0.0.1:{request.url.port}/")


async def test_a_host_is_where_its_lookup_says_and_nowhere_else() -> None:
    asked: list[str] = []

    async def lookup(host: str) -> Sequence[str]:
        asked.append(host)
        if host == "gone.tenant.svc":
            raise SourceError("there is no Service gone")
        return ["127.0.0.1"]

    app = web.Application()
    app.router.add_get("/", _long)
    app.router.add_get("/elsewhere", _elsewhere)
    async with TestServer(app) as server:
        page = Page(f"http://queue.tenant.svc:{server.port}/", 2000, lookup=lookup)
        assert await page.get() == (200, b"x" * 2000)
        await page.close()
        gone = Page(f"http://gone.tenant.svc:{server.port}/", 2000, lookup=lookup)
        with pytest.raises(SourceError, match="there is no Service gone"):
            await gone.get()
        await gone.close()
        assert asked == ["queue.tenant.svc", "gone.tenant.svc"]
        redirected = Page(f"http://queue.tenant.svc:{server.port}/elsewhere", 2000, lookup=lookup)
        with pytest.raises(SourceError, match=f"redirects to 'http://127.0.0.1:{server.port}/', which is not followed: name where it is"):
            await redirected.get()
        await redirected.close()
        ours = Page(f"http://127.0.0.1:{server.port}/elsewhere", 2000)
        assert (await ours.get())[0] == 200, "whoever runs the machine says where it is asked"
        await ours.close()
