"""A WebSocket through the gateway: once the engine has agreed (101), bytes go both ways unread, until either side ends.

The client's half comes from aiohttp's server: it stops to parse where a request asks for `Upgrade: websocket`, keeps what follows, and
gives it to the parser that a handler sets. Ours parses nothing. Other protocols are not upgraded to: aiohttp would go on to read requests,
and none is in use with engines. A request for one (curl's h2c) is passed on without the wish, as RFC 9110 allows.
"""

from __future__ import annotations

import asyncio
from typing import cast

from aiohttp import HttpVersion11, web
from aiohttp.http import WebSocketReader

from scaler.gateway.connection import Connection
from scaler.gateway.reply import Reply


def asks_for_upgrade(request: web.BaseRequest) -> bool:
    """Whether the client wants to go on as a WebSocket."""
    headers = request.headers
    return (
        "Upgrade" in headers
        and headers["Upgrade"].strip().lower() == "websocket"
        and any("upgrade" in value.lower() for value in headers.getall("Connection", ()))
        and request.method == "GET"
        and request.version >= HttpVersion11
    )


async def splice(request: web.BaseRequest, connection: Connection, reply: Reply) -> None:
    """Passes bytes both ways until the engine ends; a client that leaves cancels it. Raises: OSError: the engine ended improperly."""
    reply.finish()
    request.protocol.set_parser(cast(WebSocketReader, Frames(request, connection)))
    await connection.pass_on(reply)


class Frames:
    """In the place of aiohttp's reader of frames: what the client sends goes to the engine as it is."""

    def __init__(self, request: web.BaseRequest, connection: Connection) -> None:
        self._request = request
        self._connection = connection

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        try:
            self._connection.send(data)
        except OSError:
            return False, b""  # the engine has ended, and the client is being told
        room, transport = self._connection.room, self._request.transport
        if room is not None and transport is not None:
            transport.pause_reading()
            room.add_done_callback(self._resume)
        return False, b""

    def feed_eof(self) -> None:
        """The client has gone: its handler is being cancelled."""

    def _resume(self, _: asyncio.Future[None]) -> None:
        transport = self._request.transport
        if transport is not None:
            transport.resume_reading()
