"""The gateway: every request's way in, from its head to the replica that answers it.

A request finds its model (routing), takes a place on a replica or is held in a fair line until there is one (dispatcher), and is
exchanged with it (exchange). aiohttp's low-level server is used, not its Application: there is nothing to route by path, and no middleware
on the hot path. A client that leaves cancels its handler, which gives its place back from wherever it stands.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from urllib.parse import unquote

from aiohttp import web

from scaler.books.demand import UnknownModel
from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger, QueueFull
from scaler.books.limits import MIB
from scaler.gateway import metrics, routing
from scaler.gateway.client_gone import ClientWatch
from scaler.gateway.dispatcher import Dispatcher, Hold, Member, NoReplica
from scaler.gateway.exchange import Exchange, ReplicaFailed
from scaler.gateway.refusal import Refusal
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

BODY_BYTES = 64 * MIB  # of one body that is read to find its model
READING_BYTES = 512 * MIB  # of all bodies that are being read so
_BODY_IDLE_SECONDS = 30.0  # a body of which nothing comes for this long is given up
_KEEPALIVE_SECONDS = 75.0
_BACKLOG = 4096
_LAST_WORDS_SECONDS = 1.0  # for the refusals of a drain to reach their clients
_LEFT = 499  # the status under which a client that left is counted; nobody receives it


class Gateway:
    """Serves HTTP for every model in the ledger."""

    def __init__(self, ledger: Ledger, dispatcher: Dispatcher, clock: Clock = SYSTEM_CLOCK, *, body_bytes: int = BODY_BYTES) -> None:
        self._now = clock.now
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._activations = ledger.activations
        self._body_bytes = body_bytes
        self._reading = 0
        self._requests = 0
        self._idle = asyncio.Event()
        self._clients: ClientWatch
        self._site: web.TCPSite | None = None
        self._created = int(clock.wall())
        self.draining = False
        self.leaving = False  # requests are served, but each answer closes its connection: the next one shall be made elsewhere

    @asynccontextmanager
    async def serve(self, host: str, port: int) -> AsyncIterator[tuple[str, int]]:
        """Listens until the block ends; yields the bound address (port 0: any). Raises: OSError if it cannot be listened on."""
        _raise_descriptors()
        self._clients = ClientWatch()
        server = web.Server(
            self._handle, handler_cancellation=True, access_log=None, auto_decompress=False, keepalive_timeout=_KEEPALIVE_SECONDS
        )
        runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=_LAST_WORDS_SECONDS)
        await runner.setup()
        try:
            self._site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
            await self._site.start()
            bound = runner.addresses[0]
            yield bound[0], bound[1]
        finally:
            await self.drain(0)
            await runner.cleanup()
            self._clients.close()

    async def drain(self, deadline: float) -> None:
        """Stops accepting, lets requests finish for `deadline` seconds, then refuses those held. Leaving `serve` cuts the rest off."""
        self.draining = True
        if self._site is not None:
            site, self._site = self._site, None
            await site.stop()
        if await self._finished(deadline):
            return
        self._dispatcher.refuse_held("the gateway is shutting down")
        await self._finished(_LAST_WORDS_SECONDS)

    async def _finished(self, seconds: float) -> bool:
        self._idle.clear()
        if self._requests:
            try:
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
            except TimeoutError:
                return False
        return True

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        arrived = self._now()
        self._requests += 1
        exchange = Exchange(request, arrived, self._now)
        code = 500
        try:
            if self.draining:
                raise Refusal(503, "draining", "the gateway is shutting down; ask another one", retry=True)
            target = routing.target(request.raw_path)
            if own := self._own(request, target):
                code = own.status
                return own
            exchange.path = target.path
            stream = await self._find(exchange, request, target)
            response = await self._through(exchange, request, stream)
            code = response.status
        except Refusal as refusal:
            metrics.REFUSED.labels(exchange.model, refusal.reason).inc()
            code = refusal.status
            self._gave_up(exchange.model, str(refusal))
            response = await exchange.refuse(refusal)
        except (asyncio.CancelledError, ConnectionError):
            code = _LEFT
            self._gave_up(exchange.model, "the client left")
            raise
        finally:
            metrics.REQUESTS.labels(exchange.model, code).inc()
            self._requests -= 1
            if not self._requests:
                self._idle.set()
        if self.draining or self.leaving:
            response.force_close()
        return response

    def _own(self, request: web.BaseRequest, target: routing.Target) -> web.Response | None:
        """The gateway's own answers: the models that can be asked for. A request that names a model belongs to the engine."""
        path = target.path.partition("?")[0]
        if request.method != "GET" or target.model or routing.MODEL in request.headers or not path.startswith("/v1/models"):
            return None
        if path.rstrip("/") == "/v1/models":
            return web.json_response({"object": "list", "data": [self._model(name) for name in sorted(self._ledger.models())]})
        if path.startswith("/v1/models/"):
            name = routing.choose([("path", unquote(path.removeprefix("/v1/models/")))], self._ledger)
            return web.json_response(self._model(name))
        return None

    def _model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "zerowake"}

    def _first_byte(self, exchange: Exchange, handed: float) -> None:
        exchange.closes = self.draining or self.leaving
        now = self._now()
        metrics.FIRST_BYTE_SECONDS.labels(exchange.model).observe(now - exchange.arrived)
        activation = self._activations.current(exchange.model)
        if activation is not None:
            activation.add("first_byte", now - handed)
            self._activations.served(exchange.model, now)

    async def _find(self, exchange: Exchange, request: web.BaseRequest, target: routing.Target) -> bool:
        """Finds the request's model, and its body if that has to be read. Returns whether a stream is asked for."""
        header = request.headers.get(routing.MODEL, "")
        named: list[tuple[str, object]] = [(f"header {routing.MODEL}", header), ("path", target.model)]
        asked: routing.Asked | None = None
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.body_exists and routing.body_first(
            request.headers, request.content_length, self._body_bytes, bool(header or target.model)
        ):
            exchange.body = await self._read(request)
            asked = routing.asked(exchange.body)
        if asked is not None:
            named.insert(0, ("body", asked.model))
        exchange.model = routing.choose(named, self._ledger)
        return asked is not None and asked.stream is True

    async def _read(self, request: web.BaseRequest) -> bytes:
        """The whole body. Raises: Refusal if it is over the bound, or does not come."""
        if (request.content_length or 0) > self._body_bytes:
            raise self._too_large()
        content = request.content
        chunks: list[bytes] = []
        size = 0
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None if content.is_eof() else _BODY_IDLE_SECONDS) as timer:
                while chunk := await content.readany():
                    size += len(chunk)
                    self._reading += len(chunk)
                    if size > self._body_bytes:
                        raise self._too_large()
                    if self._reading > READING_BYTES:
                        message = f"bodies of {READING_BYTES} bytes are being read, the gateway's bound; try again later"
                        raise Refusal(429, "reading_full", message, retry=True)
                    chunks.append(chunk)
                    if not content.is_eof():
                        timer.reschedule(loop.time() + _BODY_IDLE_SECONDS)
        except TimeoutError:
            message = f"nothing of the request's body came for {_BODY_IDLE_SECONDS:g} s, after {size} bytes"
            raise Refusal(408, "body_timeout", message) from None
        except web.RequestPayloadError as error:
            raise Refusal(400, "bad_body", f"the request's body could not be read: {error}") from error
        finally:
            self._reading -= size
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _too_large(self) -> Refusal:
        message = f"a body is read for its `model` up to {self._body_bytes} bytes, and this one is larger; "
        message += f"name the model in the header {routing.MODEL} or in the path /models/<name>/..., then it streams through"
        return Refusal(413, "body_too_large", message)

    async def _through(self, exchange: Exchange, request: web.BaseRequest, stream: bool) -> web.StreamResponse:
        """Takes a place, held until there is one, and passes the request through it; through another once if the replica fails."""
        model = exchange.model
        priority = routing.priority(request.headers)
        beats = routing.heartbeat(request.headers) if stream else None
        try:
            member = self._dispatcher.take(model)
            hold: Hold | None = None
            last = False
            while True:
                if member is None:
                    hold = hold or self._hold(exchange, request, priority)
                    with self._clients.abort_if_gone(request.transport) if exchange.streams and request.transport else nullcontext():
                        member = await self._wait(exchange, hold, beats)
                    hold = None
                try:
                    return await exchange.over(member, self._first_byte)
                except ReplicaFailed as failure:
                    self._dispatcher.failed(member, failure.error)
                    if last or not exchange.repeatable:
                        once = "once more" if last else "and its body had begun to stream, so it cannot be sent again"
                        message = f"a replica of model {model!r} failed before its answer began ({failure}), {once}"
                        raise Refusal(502, "replica_failed", message, retry=True) from failure
                    metrics.RETRIES.labels(model).inc()
                    last = True
                    hold = self._dispatcher.hold(model, routing.tenant(request.headers), priority, exchange.size, again=True)
                finally:
                    self._dispatcher.release(member)
                    member = None
        except UnknownModel as error:
            raise Refusal(404, "model_not_found", str(error), param="model") from error

    def _hold(self, exchange: Exchange, request: web.BaseRequest, priority: Priority) -> Hold:
        model = exchange.model
        try:
            return self._dispatcher.hold(model, routing.tenant(request.headers), priority, exchange.size, arrived=exchange.arrived)
        except QueueFull as error:
            raise Refusal(429, f"too_many_{error.bound}", str(error), retry=True) from error

    async def _wait(self, exchange: Exchange, hold: Hold, beats: float | None) -> Member:
        """Waits for a place, with a heartbeat every `beats` seconds. Whatever ends the wait early gives it up."""
        begun = self._now()
        try:
            if beats is not None:
                while not hold.future.done():
                    await exchange.beat()
                    await asyncio.wait((hold.future,), timeout=beats)
            member = await hold.future
        except NoReplica as error:
            raise Refusal(503, "no_replica", str(error), retry=True) from error
        except BaseException:
            self._dispatcher.leave(hold)
            raise
        metrics.HELD_SECONDS.labels(hold.pool.model).observe(self._now() - begun)
        return member

    def _gave_up(self, model: str, reason: str) -> None:
        """A request ends without an answer: if it was the last one, so does the activation."""
        if self._activations.current(model) is None:
            return
        if not self._ledger.knows(model) or self._ledger.demand(model).pending == 0:
            self._activations.abandoned(model, reason)


def _raise_descriptors() -> None:
    """Every held request is an open connection: as many as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
