"""10,000 clients that hold connections and ask for nothing, beside those who ask: does anybody wait for them?

    python -m tests.bench.slow_clients [--clients 10000] [--seconds 40]

A third of them connects and is silent, a third sends the head of a request byte by byte, a third its body. Beside them requests are sent
one after the other, each by a connection of its own, before, meanwhile and after; every one has to be answered. Engine and gateway are
processes of their own (gateway.py). The slow clients are in the process that asks, so that what a request takes is an upper bound.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import sys
import time
from collections import Counter
from typing import cast

import aiohttp
import uvloop
from rich.console import Console

from tests.bench.child import Child, child
from tests.bench.figures import Figure
from tests.bench.gateway import ANSWER, BODY
from tests.bench.shown import shown
from tests.worlds.processes import resident

AT_ONCE = 200  # connections that are made at a time
BYTE_SECONDS = 2.0  # between two bytes of a slow client
ALONE_SECONDS = 8.0
REST_SECONDS = 0.02  # between two requests
WORST = 1.0  # seconds that a request may take meanwhile
_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
_SLOW = {
    "silent": (b"", b""),
    "head": (_HEAD, b"X-Padding: " + b"x" * 4000),
    "body": (_HEAD + b"Content-Length: 4000\r\n\r\n", BODY.ljust(4000)),
}


class _Slow(asyncio.Protocol):
    """One slow client. `ended`: what it was told as it was closed, or nothing."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.got = b""
        self.is_open = True
        self._first, self._rest = _SLOW[kind]
        self._at = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._first)

    def data_received(self, data: bytes) -> None:
        self.got += data

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False

    def drip(self) -> None:
        if self.is_open and self._at < len(self._rest):
            self.transport.write(self._rest[self._at : self._at + 1])
            self._at += 1

    @property
    def ended(self) -> str:
        status = self.got.partition(b"\r\n")[0].decode(errors="replace").partition(" ")[2]
        return "still open" if self.is_open else status or "closed without a word"


async def _drip(slow: list[_Slow]) -> None:
    """A byte each now and again, spread over the time between."""
    while True:
        for start in range(0, len(slow), AT_ONCE):
            for each in slow[start : start + AT_ONCE]:
                each.drip()
            await asyncio.sleep(BYTE_SECONDS * AT_ONCE / len(slow))


async def _asked(url: str, seconds: float) -> list[float]:
    """Seconds of each request, one after the other. Raises RuntimeError: one was not answered as it has to be."""
    took = []
    until = time.monotonic() + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
        while time.monotonic() < until:
            begun = time.perf_counter()
            async with client.post(url, data=BODY, headers={"Content-Type": "application/json"}) as response:
                body = await response.read()
            if response.status != 200 or body != ANSWER:
                raise RuntimeError(f"beside slow clients {url} answered {response.status}: {body[:200]!r}")
            took.append(time.perf_counter() - begun)
            await asyncio.sleep(REST_SECONDS)
    return took


def _figure(name: str, took: list[float], at_most: float | None = None) -> Figure:
    detail = f"of {len(took)}; median {statistics.median(took) * 1000:.1f} ms, p99 {sorted(took)[len(took) * 99 // 100] * 1000:.1f} ms"
    return Figure(name, max(took), "s", at_most=at_most, detail=detail)


async def _measure(console: Console, clients: int, seconds: float) -> list[Figure]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with child("tests.bench.gateway", "engine") as engine:
        (port,) = await engine.line()
        async with child("tests.bench.gateway", "gateway", str(port)) as gateway:
            (front,) = await gateway.line()
            await gateway.tell("replica")
            return await _beside(console, gateway, front, clients, seconds)


async def _beside(console: Console, gateway: Child, front: int, clients: int, seconds: float) -> list[Figure]:
    url = f"http://127.0.0.1:{front}/v1/chat/completions"
    before = await _asked(url, ALONE_SECONDS)
    alone = resident(gateway.process.pid)
    loop, kinds = asyncio.get_running_loop(), list(_SLOW)
    slow: list[_Slow] = []
    while len(slow) < clients:
        made = [
            loop.create_connection(lambda kind=kinds[number % 3]: _Slow(kind), "127.0.0.1", front)  # type: ignore[misc]
            for number in range(len(slow), min(len(slow) + AT_ONCE, clients))
        ]
        slow += [protocol for _, protocol in await asyncio.gather(*made)]
    dripping = asyncio.create_task(_drip(slow))
    meanwhile = await _asked(url, seconds)
    full = resident(gateway.process.pid)
    ends = Counter(f"{each.kind}: {each.ended}" for each in slow)
    dripping.cancel()
    for each in slow:
        each.transport.abort()
    after = await _asked(url, ALONE_SECONDS)
    console.print(f"after {seconds:g} s: {', '.join(f'{count} {end}' for end, count in sorted(ends.items()))}")
    return [
        _figure("a request alone, the worst", before),
        _figure(f"a request beside {clients:,} slow clients, the worst", meanwhile, at_most=WORST),
        _figure("a request after they have gone, the worst", after),
        Figure("memory over that of a gateway without them", (full - alone) / 1e6, "MB", detail=f"{alone / 1e6:.0f} MB without"),
    ]


def run() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.slow_clients", description="requests beside many slow clients")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=40.0)
    given = parser.parse_args()
    console = Console(highlight=False)
    return shown(console, uvloop.run(_measure(console, given.clients, given.seconds)), "", "", {})


if __name__ == "__main__":
    sys.exit(run())
