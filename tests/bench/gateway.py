"""The gateway beside the engine reached directly, what it costs, and 10,000 held requests. Engine, gateway and client are three processes.

What it costs is the processor time of the gateway's process alone, user and system: it hardly moves with what else runs on the machine.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time

import aiohttp
import uvloop
from aiohttp import web

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway.dispatcher import Backend, Dispatcher, Endpoint
from scaler.gateway.gateway import Gateway
from tests.bench.child import Child, child, told
from tests.bench.figures import Figure
from tests.worlds.processes import resident

ROUNDS, IN_ROUND = 20, 150  # alternating between the two ways, so that both meet the same machine
BUSY_SECONDS, BUSY_CLIENTS = 5.0, 32
HELD = 10_000
COUNTED = 10_000  # requests, and events, whose processor time is told
STREAMS, PAUSE_SECONDS = 32, 0.01  # at once; between the events of each, so that every event is a packet of its own
BODY = b'{"model": "m", "stream": false, "messages": [{"role": "user", "content": "' + b"How does CRIU work? " * 10 + b'"}]}'
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "With"}, "finish_reason": null}]}\n\n'
ANSWER = b'{"choices": [{"message": {"role": "assistant", "content": "' + b"With care. " * 20 + b'"}}]}'


async def _engine() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        if "events" not in request.query:
            return web.Response(body=ANSWER, content_type="application/json")
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for _ in range(int(request.query["events"])):
            await stream.write(EVENT)
            await asyncio.sleep(PAUSE_SECONDS)
        return stream

    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(runner.addresses[0][1], flush=True)
    await told()


async def _gateway(port: int) -> None:
    """Serves model `m`; each line on standard input is answered with its own memory, the requests held, and its processor time."""
    ledger = Ledger({"m": ModelLimits(max_requests=HELD, concurrency=64)})
    dispatcher = Dispatcher(ledger)
    async with Gateway(ledger, dispatcher).serve("127.0.0.1", 0) as address:
        print(address[1], flush=True)
        while line := await told():
            if line == "replica":
                dispatcher.add(Backend("r", "m", Endpoint("127.0.0.1", port)))
            elif line == "no replica":
                dispatcher.remove("r")
            demand = ledger.demand("m")
            print(resident(os.getpid()), demand.held, time.process_time_ns(), flush=True)
        await dispatcher.close()


async def _ask(client: aiohttp.ClientSession, url: str) -> float:
    """Seconds from the request to the end of its answer."""
    begun = time.perf_counter()
    async with client.post(url, data=BODY, headers={"Content-Type": "application/json"}) as response:
        body = await response.read()
    if response.status != 200 or body != ANSWER:
        raise RuntimeError(f"{url} answered {response.status}: {body[:200]!r}")
    return time.perf_counter() - begun


async def _busy(client: aiohttp.ClientSession, url: str) -> float:
    """Requests a second with BUSY_CLIENTS at once."""
    count = 0
    end = time.perf_counter() + BUSY_SECONDS

    async def one() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await _ask(client, url)
            count += 1

    await asyncio.gather(*(one() for _ in range(BUSY_CLIENTS)))
    return count / BUSY_SECONDS


async def _cost(client: aiohttp.ClientSession, gateway: Child, url: str) -> list[Figure]:
    """The processor time of the gateway, for requests and for events."""

    async def ask(count: int) -> None:
        for _ in range(count):
            await _ask(client, url)

    async def stream(events: int) -> None:
        async with client.post(f"{url}?events={events}", data=BODY, headers={"Content-Type": "application/json"}) as response:
            if await response.read() != EVENT * events:
                raise RuntimeError(f"{url} passed a stream on that is not the engine's")

    figures = []
    for name, work, clients in (("requests", ask, BUSY_CLIENTS), ("events", stream, STREAMS)):
        await asyncio.gather(*(work(10) for _ in range(clients)))
        *_, before = await gateway.tell("how long")
        await asyncio.gather(*(work(COUNTED // clients) for _ in range(clients)))
        *_, after = await gateway.tell("how long")
        seconds = (after - before) / 1e9
        detail = f"{seconds / COUNTED * 1e6:.0f} us each; {clients} at once"
        figures.append(Figure(f"gateway, processor time of {COUNTED:,} {name}", seconds, "s", detail=detail))
    return figures


def _percentile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[int(len(seconds) * share)] * 1000


async def _measure() -> list[Figure]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    figures = []
    async with (
        child("tests.bench.gateway", "engine") as engine,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        (port,) = await engine.line()
        async with child("tests.bench.gateway", "gateway", str(port)) as gateway:
            (front,) = await gateway.line()
            direct, through = f"http://127.0.0.1:{port}/v1/chat/completions", f"http://127.0.0.1:{front}/v1/chat/completions"
            await gateway.tell("replica")
            took: dict[str, list[float]] = {direct: [], through: []}
            for url in (direct, through):
                for _ in range(IN_ROUND):
                    await _ask(client, url)
            for _ in range(ROUNDS):
                for url, seconds in took.items():
                    seconds += [await _ask(client, url) for _ in range(IN_ROUND)]
            for share, name, goal in ((0.5, "p50", 0.5), (0.99, "p99", 5.0)):
                ways = [_percentile(took[url], share) for url in (through, direct)]
                detail = f"{ways[0]:.2f} through it, {ways[1]:.2f} directly; {ROUNDS * IN_ROUND} requests each, one at a time"
                figures.append(Figure(f"gateway adds, {name}", ways[0] - ways[1], "ms", at_most=goal, detail=detail))
            figures += await _cost(client, gateway, through)
            busy = [await _busy(client, url) for url in (through, direct)]
            detail = f"{BUSY_CLIENTS} clients at once in one process; the engine reached directly: {busy[1]:.0f}"
            figures.append(Figure("gateway, requests a second of one process", busy[0], "1/s", detail=detail))
        async with child("tests.bench.gateway", "gateway", str(port)) as gateway:
            (front,) = await gateway.line()
            figures += await _held(client, gateway, f"http://127.0.0.1:{front}/v1/chat/completions")
    return figures


async def _held(client: aiohttp.ClientSession, gateway: Child, url: str) -> list[Figure]:
    # Idle is a gateway that has served: its code is loaded and its first buffers are made.
    await gateway.tell("replica")
    await asyncio.gather(*(_ask(client, url) for _ in range(100)))
    idle, *_ = await gateway.tell("no replica")
    asked = [asyncio.create_task(_ask(client, url)) for _ in range(HELD)]
    held = 0
    while held < HELD:
        full, held, _ = await gateway.tell("how many")
    begun = time.perf_counter()
    await gateway.tell("replica")
    await asyncio.gather(*asked)
    took = time.perf_counter() - begun
    detail = f"{(full - idle) / HELD / 1024:.1f} KiB each with a body of {len(BODY)} bytes, over {idle / 1e6:.0f} MB idle"
    return [
        Figure(f"{HELD:,} held requests, memory over idle", (full - idle) / 1e6, "MB", at_most=200, detail=detail),
        Figure(f"{HELD:,} held requests, answered", len(asked), "answers", at_least=HELD, detail=f"by one replica in {took:.1f} s"),
    ]


def main() -> list[Figure]:
    return uvloop.run(_measure())


if __name__ == "__main__":
    uvloop.run(_engine() if sys.argv[1] == "engine" else _gateway(int(sys.argv[2])))
