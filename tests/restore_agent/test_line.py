"""The connections to one server: kept for the next read, cut where one was given up, closed with their line."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from restore_agent.transfer.line import Line
from restore_agent.transfer.source import Absent, Altered, Unreachable
from restore_agent.transfer.spare_memory import SpareMemory
from tests.worlds.waiting import until
from zerowake_shared.address import Address

DATA = random.Random(5).randbytes(300_000)
SPARE = 100_000


@dataclass
class There:
    """A server of a file, over HTTP without TLS."""

    line: Line
    asked: list[object] = field(default_factory=list)  # the connection of each request


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[There]:
    (tmp_path / "file").write_bytes(DATA)

    async def give(request: web.Request) -> web.StreamResponse:
        found.asked.append(request.transport)
        assert request.headers["Host"] == "a-name:1"
        return web.FileResponse(tmp_path / "file") if request.query["signed"] == "by us" else web.Response(status=404)

    async def for_ever(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "100"})
        await answer.prepare(request)
        await answer.write(b"begun")
        await stop.wait()
        return answer

    async def too_much(request: web.Request) -> web.Response:
        return web.Response(body=DATA)

    stop = asyncio.Event()
    app = web.Application()
    app.add_routes([web.get("/file", give), web.get("/hangs", for_ever), web.get("/whole", too_much)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    with ThreadPoolExecutor(8) as threads:
        address = Address("127.0.0.1", runner.addresses[0][1])
        found = There(Line(address, "a-name:1", lambda: None, threads, SpareMemory(SPARE)))
        yield found
        await asyncio.to_thread(found.line.close)
    stop.set()
    await runner.cleanup()


async def read(line: Line, path: str, offset: int, length: int) -> bytes:
    return b"".join([bytes(piece) async for piece in line.read(path, offset, length)])


async def test_reads_one_after_the_other_take_one_connection(there: There) -> None:
    pieces = [len(piece) async for piece in there.line.read("/file?signed=by%20us", 0, len(DATA))]
    assert max(pieces) <= SPARE and sum(pieces) == len(DATA)
    assert await read(there.line, "/file?signed=by%20us", 7, 1000) == DATA[7:1007]
    assert await there.line.size("/file?signed=by%20us") == len(DATA)
    assert len(there.asked) == 3 and len(set(there.asked)) == 1


async def test_reads_at_the_same_time_take_one_each(there: There) -> None:
    got = await asyncio.gather(*(read(there.line, "/file?signed=by%20us", at, SPARE) for at in (0, SPARE, 2 * SPARE)))
    assert b"".join(got) == DATA
    assert len(there.line._idle) == len(there.line._all) == len(set(there.asked))


async def test_what_is_not_given(there: There) -> None:
    with pytest.raises(Absent):
        await read(there.line, "/file?signed=no", 0, 5)
    with pytest.raises(Altered, match="begins to send 300000 bytes, and was asked for 5"):
        await read(there.line, "/whole", 0, 5)


async def test_one_that_is_given_up_is_cut_and_no_other_read_has_it(there: There) -> None:
    async with contextlib.aclosing(there.line.read("/hangs", 0, 100)) as pieces:
        reading = asyncio.ensure_future(anext(pieces))
        await until(lambda: there.line._all, "it has been begun")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await until(lambda: not there.line._all, "its connection is gone")
    assert await read(there.line, "/file?signed=by%20us", 0, 5) == DATA[:5]


async def test_whoever_reads_as_the_line_is_closed_gets_an_error(there: There) -> None:
    async with contextlib.aclosing(there.line.read("/hangs", 0, 100)) as pieces:
        assert bytes(await anext(pieces)) == b"begun"
        reading = asyncio.ensure_future(anext(pieces))
        await asyncio.to_thread(there.line.close)
        with pytest.raises(Unreachable):
            await reading
