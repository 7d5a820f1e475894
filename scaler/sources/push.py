"""Demand that others tell: whoever runs another gateway posts how many requests of a model it has, and until when that is to count.

    POST /demand   Authorization: Bearer TOKEN   {"model": "chat", "pending": 7, "by": "", "ttl_seconds": 60}

A number replaces the one that the same one has told before. When its time is over and nothing has followed, the source is unknown, and not
zero: who has nothing pending says 0, and says it again in time. Each that tells is a source of its own (`by`), declared with its model, so
that one which never speaks is missed. The token is in a file, which is read for each request, so that a new one counts.
Rejected: telling for models that have not declared it (whoever has the token could keep any model up, and nobody would know whom to miss).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from pathlib import Path
from typing import Annotated

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scaler.sources.push_declaration import PATH, PushDeclaration
from scaler.sources.source import Reading, whole
from scaler.sources.watch import Sources

log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 16


class _Told(BaseModel):
    """What is posted. pending: requests; ttl_seconds: for so long."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    model: str
    by: str = ""
    pending: Annotated[float, Field(ge=0, le=1e9)]
    ttl_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0


class Pushes:
    """Takes what is posted."""

    def __init__(self, sources: Sources, token_file: Path) -> None:
        self._sources = sources
        self._token_file = token_file

    @property
    def route(self) -> web.RouteDef:
        return web.post(PATH, self._take)

    async def _take(self, request: web.Request) -> web.Response:
        try:
            token = (await asyncio.to_thread(self._token_file.read_bytes)).strip()
        except OSError as error:
            log.error("nobody can tell of demand: the token in %s cannot be read: %s", self._token_file, error.strerror)
            return web.Response(status=503, text="the token of this server cannot be read; its log says why\n")
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not token or not hmac.compare_digest(given, b"Bearer " + token):
            return web.Response(
                status=401, text="the header Authorization has to be: Bearer TOKEN\n", headers={"WWW-Authenticate": "Bearer"}
            )
        body = await request.content.read(_MOST_BYTES)
        while len(body) < _MOST_BYTES and (more := await request.content.read(_MOST_BYTES - len(body))):
            body += more
        try:
            told = _Told.model_validate_json(body)
        except ValidationError as error:
            why = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the body'}: {each['msg']}" for each in error.errors())
            self._complain(body, why)
            return web.Response(status=400, text=f"{why}\n")
        reading = Reading(whole(told.pending, f"{told.pending:g}"))
        if not self._sources.told(told.model, PushDeclaration(type="push", by=told.by), reading, told.ttl_seconds):
            return web.Response(status=404, text=f"model {told.model!r} has no source of type push with by: {told.by!r}\n")
        return web.Response(status=204)

    def _complain(self, body: bytes, why: str) -> None:
        """Of what cannot be used, the source that it is of counts a failure."""
        try:
            found = json.loads(body)
            model, by = found["model"], found.get("by", "")
            self._sources.misled(str(model), PushDeclaration(type="push", by=by), f"what was posted is of no use: {why}")
        except (ValueError, LookupError, TypeError, AttributeError):
            return
