"""Demand that others tell: whoever runs another gateway posts how many requests of a model it has, and until when that is to count.

    POST /demand   Authorization: Bearer TOKEN   {"model": "chat", "pending": 7, "by": "", "ttl_seconds": 60}

A number replaces the one that the same one has told before. When its time is over and nothing has followed, the source is unknown, and not
zero: who has nothing pending says 0, and says it again in time. Each that tells is a source of its own (`by`), declared with its model, so
that one which never speaks is missed. Who may tell of which models is a guard's to say: on one machine whoever has the token in a file,
which is read for each request, so that a new one counts.
Rejected: telling for models that have not declared it (whoever has the token could keep any model up, and nobody would know whom to miss).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Protocol

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scaler.sources.push_declaration import PATH, PushDeclaration
from scaler.sources.source import Declaration, Reading, whole
from zerowake_shared.json_text import parsed
from zerowake_shared.web_server import served

log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 16


class _Told(BaseModel):
    """What is posted. pending: requests; ttl_seconds: for so long."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    model: str
    by: str = ""
    pending: Annotated[float, Field(ge=0, le=1e9)]
    ttl_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0


class Denied(Exception):
    """Nothing is taken of whoever asks. status: HTTP's."""

    def __init__(self, status: int, why: str) -> None:
        self.status = status
        super().__init__(why)


class Guard(Protocol):
    """Says who may tell of which models."""

    async def permitted(self, authorization: str) -> Callable[[str], bool]:
        """Whether the bearer of this header may tell of a model. Raises: Denied."""


class TokenFile:
    """Whoever has the token in this file may tell of all models."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def permitted(self, authorization: str) -> Callable[[str], bool]:
        try:
            token = (await asyncio.to_thread(self._file.read_bytes)).strip()
        except OSError as error:
            log.error("nobody can tell of demand: the token in %s cannot be read: %s", self._file, error.strerror)
            raise Denied(503, "the token of this server cannot be read; its log says why") from None
        given = authorization.encode("utf-8", "surrogateescape")
        if not token or not hmac.compare_digest(given, b"Bearer " + token):
            raise Denied(401, "the header Authorization has to be: Bearer TOKEN")
        return lambda _: True


class Hearer(Protocol):
    """Who is told (Sources, or who tells others, too)."""

    def told(self, model: str, declared: Declaration, reading: Reading, hold_seconds: float) -> bool: ...

    def misled(self, model: str, declared: Declaration, why: str) -> None: ...


class Pushes:
    """Takes what is posted."""

    def __init__(self, sources: Hearer, guard: Guard) -> None:
        self._sources = sources
        self._guard = guard

    @property
    def route(self) -> web.RouteDef:
        return web.post(PATH, self._take)

    @asynccontextmanager
    async def serve(self, host: str, port: int) -> AsyncIterator[tuple[str, int]]:
        """At an address of its own; yields the bound one (port 0: any). Raises: CannotListen."""
        app = web.Application()
        app.add_routes([self.route])
        async with served(app, host, port, "the server for what is posted of demand") as bound:
            yield bound

    async def _take(self, request: web.Request) -> web.Response:
        try:
            permitted = await self._guard.permitted(request.headers.get("Authorization", ""))
        except Denied as denied:
            headers = {"WWW-Authenticate": "Bearer"} if denied.status == 401 else None
            return web.Response(status=denied.status, text=f"{denied}\n", headers=headers)
        body = await request.content.read(_MOST_BYTES)
        while len(body) < _MOST_BYTES and (more := await request.content.read(_MOST_BYTES - len(body))):
            body += more
        try:
            told = _Told.model_validate_json(body)
        except ValidationError as error:
            why = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the body'}: {each['msg']}" for each in error.errors())
            self._complain(body, why, permitted)
            return web.Response(status=400, text=f"{why}\n")
        reading = Reading(whole(told.pending, f"{told.pending:g}"))
        if not permitted(told.model) or not self._sources.told(
            told.model, PushDeclaration(type="push", by=told.by), reading, told.ttl_seconds
        ):
            return web.Response(status=404, text=f"model {told.model!r} has no source of type push with by: {told.by!r}\n")
        return web.Response(status=204)

    def _complain(self, body: bytes, why: str, permitted: Callable[[str], bool]) -> None:
        """Of what cannot be used, the source that it is of counts a failure."""
        try:
            found = parsed(body)
            model, by = found["model"], found.get("by", "")
            declared = PushDeclaration(type="push", by=by)
            if permitted(str(model)):
                self._sources.misled(str(model), declared, f"what was posted is of no use: {why}")
        except (ValueError, LookupError, TypeError, AttributeError):
            return
