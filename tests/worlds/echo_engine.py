"""A small OpenAI-shaped engine for the gateway's tests: it echoes, and says each piece only when the test lets it.

In the test's own process as `Engine`, or as a process of its own that can be killed: `python tests/worlds/echo_engine.py` prints its port.
There its pieces are released by `POST /release`, and its file descriptors 0 and 1 are the only thing it shares with the test.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from aiohttp import web

from scaler.gateway.dispatcher import Backend, Endpoint


class Engine:
    """`await engine.seen.get()`: the next request that arrived; `engine.say(n)`: releases n pieces of answers; `left`: requests cut off."""

    def __init__(self, *, held: bool = False, host: str = "127.0.0.1", port: int = 0) -> None:
        """held: answers wait for `say`, else they come at once."""
        self.seen: asyncio.Queue[str] = asyncio.Queue()
        self.left: asyncio.Queue[str] = asyncio.Queue()
        self._pieces: asyncio.Semaphore | None = asyncio.Semaphore(0) if held else None
        self._address = host, port
        self.working = self.most = 0
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/upload", self._upload)
        app.router.add_post("/release", self._release)
        app.router.add_route("*", "/{path:.*}", self._echo)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, auto_decompress=False, shutdown_timeout=0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, *self._address).start()
        self._address = self._runner.addresses[0][:2]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        return self._address[1]

    def replica(self, name: str = "r1", model: str = "m", netns: str = "") -> Backend:
        return Backend(name, model, Endpoint(*self._address, netns))

    def say(self, pieces: int = 1) -> None:
        assert self._pieces is not None
        for _ in range(pieces):
            self._pieces.release()

    @asynccontextmanager
    async def _work(self, name: str) -> AsyncIterator[None]:
        self.working += 1
        self.most = max(self.most, self.working)
        self.seen.put_nowait(name)
        try:
            yield
        except asyncio.CancelledError:
            self.left.put_nowait(name)
            raise
        finally:
            self.working -= 1

    async def _turn(self) -> None:
        if self._pieces is not None:
            await self._pieces.acquire()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        text = asked["messages"][-1]["content"]
        async with self._work(text):
            if text == "fail":
                error = {"message": "told to fail", "type": "engine_error", "param": None, "code": "told"}
                return web.json_response({"error": error}, status=500)
            if not asked.get("stream"):
                await self._turn()
                return web.json_response(
                    _completion(asked["model"], {"message": {"role": "assistant", "content": text}}, "chat.completion")
                )
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await response.prepare(request)
            for word in text.split():
                await self._turn()
                piece = _completion(asked["model"], {"delta": {"content": word}}, "chat.completion.chunk")
                await response.write(f"data: {json.dumps(piece)}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
            return response

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        """Answers each chunk with its length, as it comes."""
        response = web.StreamResponse()
        await response.prepare(request)
        async for chunk in request.content.iter_any():
            await response.write(f"{len(chunk)}\n".encode())
        return response

    async def _release(self, request: web.Request) -> web.Response:
        self.say(int(await request.text()))
        return web.Response()

    async def _echo(self, request: web.Request) -> web.Response:
        async with self._work(request.path):
            body = await request.read()
            await self._turn()
            told = {
                "method": request.method,
                "target": request.raw_path,
                "headers": [(name.decode(), value.decode("utf-8", "surrogateescape")) for name, value in request.raw_headers],
                "body": body.hex(),
            }
            return web.json_response(told, status=int(request.headers.get("X-Status", "200")), headers={"X-Engine": "yes"})


def _completion(model: str, choice: dict[str, object], kind: str) -> dict[str, object]:
    return {"id": "c1", "object": kind, "created": 1, "model": model, "choices": [{"index": 0, "finish_reason": None, **choice}]}


async def _main() -> None:
    async with Engine(held="held" in sys.argv[1:]) as engine:
        print(engine.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main())
