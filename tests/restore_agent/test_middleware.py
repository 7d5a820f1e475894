"""The middleware of vLLM's API server, around an app and an engine of the test's own that are called as vLLM's are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.workload.control_directory import GPUS, QUIESCE_REQUESTED, READY, VARIABLE, WEIGHTS
from restore_agent.workload.vllm.middleware import Snapshots
from tests.worlds.waiting import until

PATIENCE = 10.0


class Engine:
    """As AsyncLLM is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.ranks = 2

    async def collective_rpc(self, method: str, *, args: tuple[object, ...] = ()) -> list[Any]:
        self.calls.append((method, *args))
        ranks = [{"/weights/model-1": "GPU-a"}, {"/weights/model-2": "GPU-b"}][: self.ranks]
        return ranks if method == "checkpoints" else [None] * len(ranks)

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append(("sleep", level, mode))

    async def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(("wake_up",))


class Server:
    """An app behind the middleware, and whoever serves it."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.asked: list[tuple[str, bool]] = []
        self.sent: list[Any] = []
        self._stop = asyncio.Event()
        self._served = Snapshots(self._app)

    async def _app(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.startup"
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = (await receive())["body"]
        self.asked.append((scope["path"], bool(body) and json.loads(body)["stream"]))
        if scope["path"] == "/v1/chat/completions" and b"logprobs" in body:
            raise RuntimeError("a model that cannot")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    async def __aenter__(self) -> Server:
        async def receive() -> Any:
            if not self.sent:
                return {"type": "lifespan.startup"}
            await self._stop.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: Any) -> None:
            self.sent.append(message["type"])

        scope = {"type": "lifespan", "app": SimpleNamespace(state=SimpleNamespace(engine_client=self.engine))}
        self._running = asyncio.create_task(self._served(scope, receive, send))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await self._running

    async def get(self, path: str) -> int:
        said = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            said.append(message)

        await self._served({"type": "http", "path": path, "method": "GET"}, receive, send)
        return int(said[0]["status"])


def tell(folder: Path, word: str, content: str = "") -> None:
    fresh = folder / f".{word}"
    fresh.write_text(content)
    fresh.rename(folder / word)


async def test_warm_asleep_awake_and_asleep_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    server = Server()
    assert await server.get("/v1/models") == 503  # before it has started
    async with server:
        await until((tmp_path / READY).exists)
        # The warm-up has asked each path whole and streamed, and has survived what the model cannot.
        assert {("/v1/completions", False), ("/v1/completions", True), ("/v1/chat/completions", True)} <= set(server.asked)
        assert server.engine.calls == [("checkpoints",), ("sleep", 2, "wait")]
        assert json.loads((tmp_path / WEIGHTS).read_text()) == {
            "directories": ["/weights/model-1", "/weights/model-2"],
            "gpus": {"/weights/model-1": "GPU-a", "/weights/model-2": "GPU-b"},
        }
        assert await server.get("/health") == 503
        assert await server.get("/v1/models") == 200  # the engine queues what comes while it is asleep

        tell(tmp_path, GPUS, json.dumps({"GPU-a": "GPU-b"}))
        tell(tmp_path, "restore-complete")
        await until(lambda: server.engine.calls[-1] == ("wake_up",))
        move, woken = server.engine.calls[2:]
        assert (move[:2], woken) == (("move", {"GPU-a": "GPU-b"}), ("wake_up",))
        assert await server.get("/health") == 200

        asked = len(server.asked)
        for word in (READY, "restore-complete"):
            (tmp_path / word).unlink()
        tell(tmp_path, QUIESCE_REQUESTED)
        await until((tmp_path / READY).exists)
        (tmp_path / QUIESCE_REQUESTED).unlink()
        assert len(server.asked) == asked, "warmed up once"
        assert await server.get("/health") == 503
        tell(tmp_path, "restore-complete")
        await until(lambda: len(server.engine.calls) == 7)
        asleep, again, woken = server.engine.calls[4:]
        assert (asleep, again[:2], woken) == (("sleep", 2, "wait"), ("move", {}), ("wake_up",))
        meetings = {move[2], again[2]}
        assert len(meetings) == 2 and all(isinstance(each, str) and len(each) >= 32 for each in meetings), "ranks meet anew each time"


async def test_one_rank_that_has_not_moved_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    server = Server()
    server.engine.ranks = 1
    async with server:
        await until((tmp_path / READY).exists)
        tell(tmp_path, "restore-complete")
        await until(lambda: server.engine.calls[-1] == ("wake_up",))
        assert server.engine.calls[2:] == [("wake_up",)]


async def test_without_a_control_directory_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    async with Server() as server:
        await until(lambda: bool(server.sent))
        assert await server.get("/health") == 200
        assert server.engine.calls == []
