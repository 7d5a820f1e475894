"""The page's address: what it answers, under which policy, and whom it cuts."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

import scaler.page
from scaler.page import site
from scaler.page.feed import LISTENERS
from scaler.page.site import serve_shown
from scaler.view.state import State
from tests.worlds import shown_state
from tests.worlds.waiting import until

FOLDER = Path(scaler.page.__file__).parent
PARTS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".css", ".js", ".svg"))


@asynccontextmanager
async def served(state: State, *, page: bool = True) -> AsyncIterator[str]:
    async def read() -> State:
        return state

    async with serve_shown("127.0.0.1", 0, lambda: "", read, page=page) as (host, port):
        yield f"http://{host}:{port}"


async def test_the_page_and_its_parts_are_served_under_a_strict_policy() -> None:
    async with served(shown_state.state()) as url, aiohttp.ClientSession() as client:
        for path, kind in [("/", "text/html"), *((f"/page/{name}", "") for name in PARTS)]:
            async with client.get(url + path) as response:
                assert response.status == 200 and (await response.text()).strip(), path
                assert response.content_type == kind or path != "/"
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                tag = response.headers["ETag"]
            async with client.get(url + path, headers={"If-None-Match": tag}) as response:
                assert response.status == 304, "what has not changed is not sent again"
        async with client.get(f"{url}/page/site.py") as response:
            assert response.status == 404, "its own code is none of its parts"
        async with client.post(url) as response:
            assert response.status == 405
        async with client.get(f"{url}/metrics") as response:
            assert response.status == 200, "the metrics stay where they are"


def test_the_page_needs_nothing_from_elsewhere_and_all_that_it_names_is_there() -> None:
    sources = {path.name: path.read_text() for path in FOLDER.iterdir() if path.suffix in (".css", ".js", ".svg", ".html")}
    for name, text in sources.items():
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function| style=\"", text), name
    named = set(re.findall(r'(?:href|src)="page/([\w.]+)"', sources["page.html"]))
    named |= {name for text in sources.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    assert named == set(PARTS)


async def test_the_stream_tells_the_state() -> None:
    async with served(shown_state.state()) as url, aiohttp.ClientSession() as client, client.get(f"{url}/events") as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        assert response.headers["Cache-Control"] == "no-store"
        assert await response.content.readline() == b"event: state\n"
        told = json.loads((await response.content.readuntil(b"\n")).removeprefix(b"data: "))
        assert [each["name"] for each in told["models"]] == [each.name for each in shown_state.state().models]


async def test_one_page_too_many_is_told_so() -> None:
    async with served(shown_state.state()) as url, AsyncExitStack() as stack:
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        for _ in range(LISTENERS):
            response = await stack.enter_async_context(client.get(f"{url}/events"))
            assert response.status == 200
        async with client.get(f"{url}/events") as response:
            assert (response.status, await response.text()) == (503, f"{LISTENERS} pages are open already: close one of them\n")
            assert response.headers["Retry-After"] == "10"


async def test_without_the_page_there_are_the_metrics_alone() -> None:
    async with served(shown_state.state(), page=False) as url, aiohttp.ClientSession() as client:
        for path, status in {"/": 404, "/events": 404, "/page/page.js": 404, "/metrics": 200, "/healthz": 200}.items():
            async with client.get(url + path) as response:
                assert response.status == status, path


async def test_a_browser_that_takes_nothing_is_cut(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_PATIENCE_SECONDS", 0.05)
    caplog.set_level("INFO")
    state = shown_state.state()
    state = replace(state, missing="more than any buffer between them " * 2_000_000)
    async with served(state) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.sendall(b"GET /events HTTP/1.1\r\nHost: here\r\n\r\n")
            await until(lambda: "took nothing of the page's events" in caplog.text, "the browser is cut")


async def test_a_server_that_ends_does_not_wait_for_pages_that_are_open() -> None:
    async with aiohttp.ClientSession() as client, AsyncExitStack() as open_pages:
        async with asyncio.timeout(30), served(shown_state.state()) as url:  # the server would wait for a minute
            response = await open_pages.enter_async_context(client.get(f"{url}/events"))
            await response.content.readline()
        with pytest.raises(aiohttp.ClientError):
            await client.get(url)
        await response.content.read()  # to its end
