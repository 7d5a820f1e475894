"""An engine's API server in the control directory: an ASGI middleware around its app, which each engine's adapter gives its sleep and wake.

    API server   warm-up → sleep ──► the process that has the GPU: lets go of all that is lent (lent_memory.py) → ready-for-snapshot
    agent        restore-complete
    API server   wake-up ──► that process: the same memory at the same addresses, and scheduling goes on

A middleware has the engine at hand, and learns when the server has started. Without SNAPSHOT_CONTROL_DIR it does nothing.

Requests that come while the engine sleeps are read and kept by it, so that they wait for nothing else; health says 503. Until it is first
ready, everything is 503, since no request may be under way in an image. The warm-up asks the whole way of a real request, through the app,
but for the socket: what that imports, compiles and caches is then in the image.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from restore_agent.workload.control_directory import ControlDirectory

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEALTH = "/health"
_QUESTION = {"max_tokens": 8, "temperature": 0, "seed": 1}
_CHAT = {"messages": [{"role": "user", "content": "Name a colour."}]}
WARM_UP: tuple[tuple[str, dict[str, object]], ...] = tuple(
    (path, {**_QUESTION, **body, "stream": stream})
    for path, body in (
        ("/v1/completions", {"prompt": "One, two,"}),
        ("/v1/completions", {"prompt": "One, two, three, four, five, six, seven, " * 8, "logprobs": 1}),
        ("/v1/chat/completions", _CHAT),
        ("/v1/chat/completions", {**_CHAT, "logprobs": True}),
    )
    for stream in (False, True)
)


class Snapshots(ABC):
    """The middleware: `app` with an engine behind it that sleeps when the agent is to dump it, and wakes when it was restored."""

    log: logging.Logger  # below the engine's own, so that it is shown

    def __init__(self, app: App) -> None:
        self._app = app
        self._control = ControlDirectory.from_environment()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.scope: Message = {}  # of the server's start
        self._offered = self._control is None  # it has been ready
        self._awake = self._control is None

    @abstractmethod
    async def fall_asleep(self) -> None:
        """Returns when no request is under way and nothing of gpumem's is held, in whichever process. Raises whatever is in the way."""

    @abstractmethod
    async def wake(self, moved: Mapping[str, str]) -> None:
        """Takes all of it back. `moved`: GPUs that have others in their place, old UUID → new one. Raises whatever is in the way."""

    async def checkpoints(self) -> list[dict[str, str]]:
        """What ranks have attached and not named themselves: of each the checkpoint directories, with the GPU that they are lent on."""
        return []

    async def renew_others(self) -> None:  # noqa: B027  (an engine may have none)
        """Has the engine's other processes make their random state anew while they sleep, where they hear of that."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and self._control:
            self.scope, self._loop = scope, asyncio.get_running_loop()
            await self._app(scope, receive, self._starting(send, self._control))
        elif scope["type"] != "lifespan" and not (self._awake or (self._offered and scope.get("path") != HEALTH)):
            await _refuse(scope, send)
        else:
            await self._app(scope, receive, send)

    def _starting(self, send: Send, control: ControlDirectory) -> Send:
        async def passed_on(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                control.start(
                    lambda: self._do(self._sleep(control)),
                    lambda moved: self._do(self._wake(moved)),
                    lambda: self._do(self.renew_others()),
                )

        return passed_on

    def _do(self, work: Any) -> None:
        """In the server's loop, from the thread of the control directory."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _sleep(self, control: ControlDirectory) -> None:
        if not self._offered:
            for path, body in WARM_UP:
                await self._ask(path, body)
            for rank in await self.checkpoints():
                for directory, gpu in rank.items():
                    control.name_weights(directory, gpu)
        self._awake = False
        begin = time.perf_counter()
        await self.fall_asleep()
        gc.collect()
        gc.freeze()
        ctypes.CDLL(None).malloc_trim(0)
        self._offered = True
        self.log.info("asleep in %.1f ms", (time.perf_counter() - begin) * 1000)

    async def _wake(self, moved: Mapping[str, str]) -> None:
        begin = time.perf_counter()
        await self.wake(moved)
        self._awake = True
        self.log.info("awake in %.1f ms", (time.perf_counter() - begin) * 1000)

    async def _ask(self, path: str, body: dict[str, object]) -> None:
        """A request of our own, as the app would see one. Its answer is nobody's; what the model has no use for is refused."""
        begin = time.perf_counter()
        content = json.dumps(body).encode()
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        scope: Message = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "app": self.scope["app"], "state": {},
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
            self.log.exception("warm-up: %s fails; what it would have warmed is slow the first time after each restore", path)
        else:
            self.log.info("warm-up: %s answers %s in %.0f ms", path, *status, (time.perf_counter() - begin) * 1000)


async def _refuse(scope: Message, send: Send) -> None:
    if scope["type"] == "http":
        body = b'{"error": {"message": "the engine is not awake yet"}}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    else:
        await send({"type": "websocket.close", "code": 1013})
