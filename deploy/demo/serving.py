"""What both demo engines share: the command line, the listener, errors in OpenAI's form, the snapshot protocol.

The loop is asyncio's own: uvloop opens an io_uring, which CRIU cannot dump. For the same reason nothing here keeps a lock, a log file or
a socket besides the listener.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from aiohttp import web

from control import Snapshot


class Refused(Exception):
    """A request that cannot be answered as it stands; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.answer = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


@web.middleware
async def refusals(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as refused:
        return web.json_response(refused.answer, status=400)


async def json_object(request: web.Request) -> dict[str, Any]:
    """Raises Refused: the body is no JSON object."""
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    return body


def application(
    model: str,
    post: str,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    is_awake: Callable[[], bool] = lambda: True,
) -> web.Application:
    """`/health`, `/v1/models` and the one path that takes work. A model that loads does not listen yet; one that sleeps is not healthy."""
    card = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "zerowake"}

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"}) if is_awake() else web.json_response({"status": "asleep"}, status=503)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [card]})

    app = web.Application(middlewares=[refusals], client_max_size=16 << 20)
    app.add_routes([web.get("/health", health), web.get("/v1/models", models), web.post(post, handler)])
    return app


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0: any free one; the line that says so names it")
    return parser.parse_args()


async def serve(app: web.Application, host: str, port: int, asleep: Callable[[], AbstractAsyncContextManager[None]] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, and offers itself for a snapshot meanwhile, `asleep`. A client that leaves cancels its handler.

    Ends with an error where what was put away for a snapshot cannot be brought back.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    snapshot = Snapshot(asleep)
    await snapshot.begin()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        sys.exit(f"cannot listen on {host}:{port}: {error.strerror}")
    print(f"serving on http://{host}:{runner.addresses[0][1]}", flush=True)
    taking, stopping = asyncio.create_task(snapshot.take()), asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, taking], return_when=asyncio.FIRST_EXCEPTION)
    if taking.done():
        taking.result()
    taking.cancel()
    await runner.cleanup()
