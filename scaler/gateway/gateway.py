"""The gateway: every request's way in, from its head to the replica that answers it.

A request's body is read if it names the model (body), its model is found (routing), it takes a place on a replica or is held in a fair
line until there is one (dispatcher), and is exchanged with that replica (exchange). aiohttp's low-level server is used, not its
Application: there is nothing to route by path, and no middleware on the hot path. A client that leaves cancels its handler, which gives
its place back from wherever it stands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import cast
from urllib.parse import unquote

from aiohttp import web
from multidict import CIMultiDictProxy

from scaler.books.activation import Activation, TraceContext
from scaler.books.demand import UnknownModel
from scaler.books.fairness import Priority
from scaler.books.ledger import Ledger, QueueFull
from scaler.gateway import headers, metrics, routing
from scaler.gateway.body import BODY_BYTES, BodyReader
from scaler.gateway.client_connection import ClientConnection, ClientServer
from scaler.gateway.client_gone import ClientWatch
from scaler.gateway.client_room import ClientRoom
from scaler.gateway.cors import READABLE, permission
from scaler.gateway.dispatcher import CannotStart, Dispatcher, Hold, Member, NoReplica
from scaler.gateway.exchange import Exchange, ReplicaFailed
from scaler.gateway.refusal import Refusal
from scaler.gateway.target import Target, read_target
from scaler.gateway.upload import Upload
from scaler.gateway.wait import Wait
from zerowake_shared.address import Address
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.listening import started

log = logging.getLogger(__name__)

_KEEPALIVE_SECONDS = 75.0
_BACKLOG = 4096
_LAST_WORDS_SECONDS = 1.0  # for the refusals of a drain to reach their clients
_LEFT = 499  # the status under which a client that left is counted; nobody receives it


class Gateway:
    """Serves HTTP for every model in the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        clock: Clock = SYSTEM_CLOCK,
        *,
        body_bytes: int = BODY_BYTES,
        room: ClientRoom | None = None,
    ) -> None:
        """body_bytes: of a body that is read for its model; room: of clients; None: what the process's descriptors allow."""
        self._now = clock.now
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._activations = ledger.activations
        self._bodies = BodyReader(body_bytes)
        self._room = room
        self._trace: Callable[[Activation, CIMultiDictProxy[str]], TraceContext] | None = None
        self._requests = 0
        self._idle = asyncio.Event()
        self._changed = asyncio.Event()  # a replica has ended its work on a request
        self._clients: ClientWatch
        self._site: web.TCPSite | None = None
        self._created = int(clock.wall())
        self.draining = False
        self.leaving = False  # requests are served, but each answer closes its connection: the next one shall be made elsewhere

    def traced_by(self, trace: Callable[[Activation, CIMultiDictProxy[str]], TraceContext]) -> None:
        """Asks `trace(activation, headers)` of the first request of each activation: what it tells its engine of the trace."""
        self._trace = trace

    @asynccontextmanager
    async def serve(self, host: str, port: int) -> AsyncIterator[tuple[str, int]]:
        """Listens until the block ends; yields the bound address (port 0: any). Raises: CannotListen."""
        self._clients = ClientWatch()
        server = ClientServer(
            self._handle,
            self._clients,
            ClientRoom.of_process() if self._room is None else self._room,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=_KEEPALIVE_SECONDS,
        )
        runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=_LAST_WORDS_SECONDS)
        await runner.setup()
        try:
            self._site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
            await started(self._site, Address(host, port), "the gateway")
            bound = runner.addresses[0]
            yield bound[0], bound[1]
        finally:
            await self._refuse()
            await self._finished(_LAST_WORDS_SECONDS)
            await runner.cleanup()
            self._clients.close()

    async def drain(self, seconds: float) -> None:
        """Stops accepting. Requests that wait for a replica have so many seconds, then they are refused; those that a replica has are
        answered to their end, however long that takes. Leaving `serve` cuts them off.
        """
        await self._accept_no_more()
        if await self._finished(seconds):
            return
        while self._dispatcher.works:
            await self._refuse()  # also those whose replica fails meanwhile
            self._changed.clear()
            await self._changed.wait()
        await self._refuse()
        await self._finished(_LAST_WORDS_SECONDS)

    async def _accept_no_more(self) -> None:
        self.draining = True
        if self._site is not None:
            site, self._site = self._site, None
            await site.stop()

    async def _refuse(self) -> None:
        await self._accept_no_more()
        self._dispatcher.refuse_held("the gateway is shutting down")

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
        """The way of a request: its target, its body if that names the model, its route, and then a replica (`_serve`)."""
        arrived = self._now()
        self._requests += 1
        model, code = "", 500
        upload = Upload(request)
        exchange: Exchange | None = None
        try:
            if self.draining:
                raise Refusal(503, "draining", "the gateway is shutting down; ask another one", retry=True)
            target = read_target(request.raw_path, lambda name: bool(self._ledger.named(name)))
            named = routing.known(routing.outside(request.headers, target), self._ledger)
            if own := self._own(request, target, named):
                code = own.status
                return own
            await self._bodies.read(request, upload, named=bool(named))
            exchange = Exchange(request, target, upload, self._now)
            route = routing.route(request.method, request.headers, target, upload, self._ledger)
            model = route.model
            response = await self._serve(request, route, upload, exchange, arrived)
            code = response.status
        except Refusal as refusal:
            metrics.REFUSED.labels(model, refusal.reason).inc()
            code = refusal.status
            self._ledger.gave_up(model, str(refusal))
            response = refusal.response if exchange is None else await exchange.refuse(refusal)
        except (asyncio.CancelledError, ConnectionError):
            code = _LEFT
            self._ledger.gave_up(model, "the client left")
            raise
        finally:
            upload.close()
            metrics.requests_of(model, code).inc()
            self._requests -= 1
            if not self._requests:
                self._idle.set()
        if self.draining or self.leaving or upload.waits:
            response.force_close()
        return response

    async def _serve(
        self, request: web.BaseRequest, route: routing.Route, upload: Upload, exchange: Exchange, arrived: float
    ) -> web.StreamResponse:
        """A place on a replica, held for until there is one; the exchange with it; once more with another one if the replica fails."""
        model = route.model
        priority = headers.priority(request.headers)
        beats = headers.heartbeat(request.headers) if route.stream else None
        try:
            member = self._dispatcher.take(model)
            if member is None:
                hold = self._hold(request, model, priority, upload.size, arrived)
                member = await self._wait(request, upload, exchange, hold, beats, arrived)
            last = False
            while True:
                try:
                    return await self._exchange(model, exchange, member, arrived)
                except ReplicaFailed as failure:
                    self._dispatcher.failed(member, failure.error)
                    if why := _not_again(failure, exchange, upload, last):
                        message = f"a replica of model {model!r} failed before its answer began ({failure}){why}"
                        raise Refusal(502, "replica_failed", message, retry=True) from failure
                    metrics.RETRIES.labels(model).inc()
                    last = True
                    hold = self._dispatcher.hold(model, headers.tenant(request.headers), priority, upload.size, again=True)
                finally:
                    self._dispatcher.release(member)
                    self._changed.set()
                member = await self._wait(request, upload, exchange, hold, beats, arrived)
        except CannotStart as error:
            raise Refusal(503, "cannot_start", str(error), retry=True) from error
        except UnknownModel as error:
            raise Refusal(404, "model_not_found", str(error), param="model") from error

    def _hold(self, request: web.BaseRequest, model: str, priority: Priority, size: int, arrived: float) -> Hold:
        """A place in the line. Raises: Refusal if the line is full."""
        try:
            return self._dispatcher.hold(model, headers.tenant(request.headers), priority, size, arrived=arrived)
        except QueueFull as error:
            raise Refusal(429, f"too_many_{error.bound}", str(error), retry=True) from error

    async def _wait(
        self, request: web.BaseRequest, upload: Upload, exchange: Exchange, hold: Hold, beats: float | None, arrived: float
    ) -> Member:
        """Waits for a place, with a heartbeat every `beats` seconds. Whatever ends the wait early gives it up."""
        begun = self._now()
        if exchange.wait is None:
            activation = self._activations.current(hold.pool.model)
            exchange.wait = Wait(arrived, begun, activation)
            if self._trace and activation and activation.trace is None:
                exchange.trace = activation.trace = self._trace(activation, request.headers)
        try:
            with self._clients.unread(cast(ClientConnection, request.protocol)) if upload.streams else nullcontext():
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

    async def _exchange(self, model: str, exchange: Exchange, member: Member, arrived: float) -> web.StreamResponse:
        """Asks the replica and passes its answer on. Raises: ReplicaFailed before the answer's first byte."""
        answer = await exchange.ask(member)
        try:
            now = self._now()
            metrics.first_byte_of(model).observe(now - arrived)
            if exchange.wait is not None and exchange.wait.activation is None:  # its replica may have gone while it stood in line
                exchange.wait.activation = self._activations.current(model)
            self._activations.answered(model, answer.handed, now)
            return await exchange.pass_on(answer, closes=self.draining or self.leaving)
        finally:
            answer.close()

    def _own(self, request: web.BaseRequest, target: Target, named: str) -> web.Response | None:
        """The gateway's own answers: the models that can be asked for, and what may be asked. What names a model belongs to the engine."""
        if request.method == "OPTIONS" and not (named and self._dispatcher.ready(named)):
            return web.Response(status=204, headers=permission(request.headers))
        path = target.path.partition("?")[0]
        if target.model or headers.MODEL in request.headers:
            return None
        if path.rstrip("/") != "/v1/models" and not path.startswith("/v1/models/"):
            return None
        if request.method not in {"GET", "HEAD"}:
            message = f"{path} can be read only: models are declared by who runs them, not through the API"
            raise Refusal(405, "method_not_allowed", message, headers={"Allow": "GET, HEAD, OPTIONS"})
        name = unquote(path.removeprefix("/v1/models").removeprefix("/"))
        if not name:
            listed = [each for model in sorted(self._ledger.models()) for each in self._models(model)]
            return web.json_response({"object": "list", "data": listed}, headers=READABLE)
        model = self._ledger.named(name) or self._ledger.named(name.rstrip("/"))
        if not model:
            raise routing.unknown(name, self._ledger)
        return web.json_response(next(each for each in self._models(model) if each["id"] in {name, name.rstrip("/")}), headers=READABLE)

    def _models(self, model: str) -> list[dict[str, object]]:
        """A model, and what else its server answers to."""
        of_all = {"object": "model", "created": self._created, "owned_by": "zerowake"}
        return [{"id": model, **of_all}, *({"id": name, **of_all, "parent": model} for name in sorted(self._ledger.names(model)))]


def _not_again(failure: ReplicaFailed, exchange: Exchange, upload: Upload, last: bool) -> str:
    """Why a request is not sent to another replica; empty: it is. No request is executed twice unless that does no harm.

    What ends one engine may well end the next, with the answers that it is giving.
    """
    if last:
        return ", once more"
    if not upload.repeatable:
        return "; the request's body had begun to stream, so it cannot be sent again"
    if failure.reached and not exchange.harmless:
        return "; it may have worked on the request, or failed because of it, so that was not sent to another one"
    return ""
