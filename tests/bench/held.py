"""10,000 held streams, minutes long: the gateway's memory, minute by minute.

    python -m tests.bench.held [--minutes 10] [--streams 10000] [--keep]

Each request asks for an event stream and for heartbeats, and is held for the given minutes, because there is no replica. Then there is one,
which answers all of them with an event every ten seconds, for as many minutes again. Every stream has to bring all of its events, in order,
and its proper end. Engine, gateway and clients are three processes; the figures are of the gateway's alone. A stream that is answered has
two descriptors there: where the system does not let one process have so many, those that are too many leave before.

Its memory counts as flat if, after the first minute of either half, a line through the minutes rises by less than one percent in ten.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
import time
from typing import ClassVar, cast

import uvloop
from rich.console import Console

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.gateway.dispatcher import Backend, Dispatcher, Endpoint
from scaler.gateway.gateway import Gateway
from tests.bench.child import Child, child, told
from tests.bench.figures import Figure
from tests.bench.shown import shown
from tests.bench.slope import Sample, rise
from tests.worlds.processes import descriptors, resident

BEAT_SECONDS = 15.0
EVENT_SECONDS = 10.0
AT_ONCE = 200  # connections that are made at a time
MOST_PERCENT = 1.0  # of its memory, in ten minutes
_OTHERS = 500  # descriptors of the gateway that are no stream's
_BODY = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "How does CRIU work?"}]}'
_REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"X-Zerowake-Heartbeat: %d\r\nContent-Length: %d\r\n\r\n%b" % (BEAT_SECONDS, len(_BODY), _BODY)
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(number: int) -> bytes:
    return b'data: {"choices": [{"index": 0, "delta": {"content": "%06d"}}]}\n\n' % number


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Stream(asyncio.Protocol):
    """The engine's side of one stream: it ticks with all others, so that ten thousand cost one timer."""

    open: ClassVar[set[_Stream]] = set()
    count = 0  # of each one's events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.got = b""
        self.said = -1

    def data_received(self, data: bytes) -> None:
        self.got += data
        if self.said < 0 and self.got.endswith(_BODY):
            self.transport.write(_HEAD)
            self.say()
            self.open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.open.discard(self)

    def say(self) -> None:
        self.said += 1
        data = _chunk(_event(self.said))
        if self.said + 1 == self.count:
            self.open.discard(self)
            data += b"0\r\n\r\n"
        self.transport.write(data)


async def _engine(count: int) -> None:
    _Stream.count = count
    server = await asyncio.get_running_loop().create_server(_Stream, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        await asyncio.sleep(EVENT_SECONDS)
        for stream in list(_Stream.open):
            stream.say()


async def _gateway(port: int, streams: int) -> None:
    """A line on standard input adds the replica; each is answered with the requests held and in flight."""
    ledger = Ledger({"m": ModelLimits(max_requests=streams, concurrency=streams, max_wait_seconds=86_400)})
    dispatcher = Dispatcher(ledger)
    async with Gateway(ledger, dispatcher).serve("127.0.0.1", 0) as address:
        print(address[1], flush=True)
        while line := await told():
            if line == "replica":
                dispatcher.add(Backend("r", "m", Endpoint("127.0.0.1", port)))
            demand = ledger.demand("m")
            print(demand.held, demand.in_flight, flush=True)
        await dispatcher.close()


class _Client(asyncio.Protocol):
    """One stream's reader: it keeps what has not become a whole event yet, and nothing else."""

    def __init__(self) -> None:
        self.beats = self.events = 0
        self.wrong = ""
        self.done = asyncio.get_running_loop().create_future()
        self._rest = b""
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(_REQUEST)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line == b": waiting":
                self.beats += 1
            elif line.startswith(b"data: "):
                if line + b"\n\n" != _event(self.events):
                    self.wrong = self.wrong or f"event {self.events} is {line!r}"
                self.events += 1
            elif line == b"0\r":
                self._ended = True
            elif line.startswith(b"HTTP/") and b" 200 " not in line:
                self.wrong = line.decode()
        if self._ended and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.wrong = self.wrong or f"the connection ended after {self.events} events: {error}"
            self.done.set_result(None)


async def _watch(console: Console, what: str, gateway: Child, minutes: float) -> list[Sample]:
    """One sample a minute, printed as it comes."""
    samples = []
    began = time.monotonic()
    for minute in range(round(minutes) + 1):
        await asyncio.sleep(began + 60 * minute - time.monotonic())
        held, in_flight = await gateway.tell("how many")
        pid = gateway.process.pid
        sample = Sample(minute, {"resident": resident(pid), "descriptors": len(descriptors(pid)), "held": held, "in flight": in_flight})
        samples.append(sample)
        console.print(f"{what}, minute {minute:2}: {sample.values['resident'] / 1e6:7.1f} MB, {held} held, {in_flight} in flight")
    return samples


async def _measure(console: Console, streams: int, minutes: float) -> tuple[list[Figure], dict[str, object]]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    answered = min(streams, (hard - _OTHERS) // 2)
    events = round(minutes * 60 / EVENT_SECONDS) + 12  # two minutes more than are watched: none ends while they are
    async with child("tests.bench.held", "--engine", str(events)) as engine:
        (port,) = await engine.line()
        async with child("tests.bench.held", "--gateway", str(port), str(streams)) as gateway:
            (front,) = await gateway.line()
            loop = asyncio.get_running_loop()
            clients: list[_Client] = []
            while len(clients) < streams:
                made = [loop.create_connection(_Client, "127.0.0.1", front) for _ in range(min(AT_ONCE, streams - len(clients)))]
                clients += [client for _, client in await asyncio.gather(*made)]
            while (await gateway.tell("how many"))[0] < streams:
                await asyncio.sleep(0.1)
            held = await _watch(console, "held", gateway, minutes)
            for client in clients[answered:]:
                client.transport.abort()
            del clients[answered:]
            while (await gateway.tell("how many"))[0] > answered:
                await asyncio.sleep(0.1)
            await gateway.tell("replica")
            while (await gateway.tell("how many"))[1] < answered:
                await asyncio.sleep(0.1)
            open_ = await _watch(console, "answered", gateway, minutes)
            await asyncio.gather(*(client.done for client in clients))
            whole = [client for client in clients if not client.wrong and client.events == events and client.beats]
            for client in [each for each in clients if each not in whole][:5]:
                console.print(f"[red]{client.wrong or f'{client.events} events of {events}, {client.beats} heartbeats'}[/]")
    figures = [Figure("streams that brought all of their events", len(whole), "streams", at_least=answered, detail=f"{events} events each")]
    for name, samples in ((f"{streams:,} streams held", held), (f"{answered:,} streams answered", open_)):
        grown = rise(samples[1:], "resident") * 10
        last = samples[-1].values["resident"]
        detail = f"{samples[1].values['resident'] / 1e6:.1f} MB after a minute, {last / 1e6:.1f} MB after {minutes:g}"
        percent = 100 * grown / last
        figures.append(Figure(f"{name}: rise of memory in ten minutes", percent, "%", at_most=MOST_PERCENT, detail=detail))
    return figures, {"minutes": {"held": [each.values for each in held], "answered": [each.values for each in open_]}}


def run() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.held", description="memory of the gateway with many held streams")
    parser.add_argument("--minutes", type=float, default=10.0, help="of either half: held, and answered")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--keep", action="store_true", help="in results/held.json")
    given = parser.parse_args()
    console = Console(highlight=False)
    figures, more = uvloop.run(_measure(console, given.streams, given.minutes))
    command = f"python -m tests.bench.held --minutes {given.minutes:g} --streams {given.streams}"
    return shown(console, figures, "held" if given.keep else "", command, more)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        uvloop.run(_engine(int(sys.argv[2])))
    elif sys.argv[1:2] == ["--gateway"]:
        uvloop.run(_gateway(int(sys.argv[2]), int(sys.argv[3])))
    else:
        sys.exit(run())
