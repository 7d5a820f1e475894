"""vLLM's API server in the control directory: `--middleware restore_agent.workload.vllm.middleware.Snapshots`.

    API server   warm-up → sleep ──► EngineCore: its worker lets go of all that is lent (worker.py) → ready-for-snapshot
    agent        restore-complete
    API server   wake-up ──► EngineCore: the same memory at the same addresses, and scheduling goes on

An ASGI middleware is vLLM's own way into that process: it has the engine at hand and learns when the server has started. Without
SNAPSHOT_CONTROL_DIR it does nothing. Rejected: `/sleep` and `/wake_up` over HTTP, which only a development mode serves, to anyone.

Requests that come while the engine sleeps are read, tokenized and queued by it, so that they wait for nothing else; health says 503.
Until it is first ready, everything is 503, since no request may be under way in an image. The warm-up asks the whole way of a real request,
through the app, but for the socket: what that imports, compiles and caches is then in the image.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from restore_agent.workload.control_directory import ControlDirectory

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_HEALTH = "/health"
_QUESTION = {"max_tokens": 8, "temperature": 0, "seed": 1}
_CHAT = {"messages": [{"role": "user", "content": "Name a colour."}]}
_WARM_UP: tuple[tuple[str, dict[str, object]], ...] = tuple(
    (path, {**_QUESTION, **body, "stream": stream})
    for path, body in (
        ("/v1/completions", {"prompt": "One, two,"}),
        ("/v1/completions", {"prompt": "One, two, three, four, five, six, seven, " * 8, "logprobs": 1}),
        ("/v1/chat/completions", _CHAT),
        ("/v1/chat/completions", {**_CHAT, "logprobs": True}),
    )
    for stream in (False, True)
)
_log = logging.getLogger("vllm.zerowake")  # below vLLM's own, so that it is shown


class Snapshots:
    """The middleware: `app` with an engine behind it that sleeps when the agent is to dump it, and wakes when it was restored."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._control = ControlDirectory.from_environment()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope: Message = {}
        self._offered = self._control is None  # it has been ready
        self._awake = self._control is None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and self._control:
            self._scope, self._loop = scope, asyncio.get_running_loop()
            await self._app(scope, receive, self._starting(send, self._control))
        elif scope["type"] != "lifespan" and not (self._awake or (self._offered and scope.get("path") != _HEALTH)):
            await _refuse(scope, send)
        else:
            await self._app(scope, receive, send)

    def _starting(self, send: Send, control: ControlDirectory) -> Send:
        async def passed_on(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                control.start(lambda: self._do(self._sleep(control)), lambda moved: self._do(self._wake(moved)))

        return passed_on

    def _do(self, work: Any) -> None:
        """In the server's loop, from the thread of the control directory."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def _engine(self) -> Any:
        return self._scope["app"].state.engine_client

    async def _sleep(self, control: ControlDirectory) -> None:
        if not self._offered:
            for path, body in _WARM_UP:
                await self._ask(path, body)
            for rank in await self._engine.collective_rpc("checkpoints"):
                for directory, gpu in rank.items():
                    control.name_weights(directory, gpu)
        self._awake = False
        begin = time.perf_counter()
        await self._engine.sleep(level=2, mode="wait")
        gc.collect()
        gc.freeze()
        ctypes.CDLL(None).malloc_trim(0)
        self._offered = True
        _log.info("asleep in %.1f ms", (time.perf_counter() - begin) * 1000)

    async def _wake(self, moved: Mapping[str, str]) -> None:
        begin = time.perf_counter()
        if moved:
            await self._engine.collective_rpc("move", args=(dict(moved),))
        await self._engine.wake_up()
        self._awake = True
        _log.info("awake in %.1f ms", (time.perf_counter() - begin) * 1000)

    async def _ask(self, path: str, body: dict[str, object]) -> None:
        """A request of our own, as the app would see one. Its answer is nobody's; what the model has no use for is refused."""
        begin = time.perf_counter()
        content = json.dumps(body).encode()
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        scope: Message = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "app": self._scope["app"], "state": {},
        }  # fmt: skip
        asked = False
        status: list[int] = []

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()  # it does not hang up
            asked = True
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])

        try:
            await self._app(scope, receive, send)
        except Exception:
            _log.exception("warm-up: %s fails; what it would have warmed is slow the first time after each restore", path)
        else:
            _log.info("warm-up: %s answers %s in %.0f ms", path, *status, (time.perf_counter() - begin) * 1000)


async def _refuse(scope: Message, send: Send) -> None:
    if scope["type"] == "http":
        body = b'{"error": {"message": "the engine is not awake yet"}}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    else:
        await send({"type": "websocket.close", "code": 1013})
