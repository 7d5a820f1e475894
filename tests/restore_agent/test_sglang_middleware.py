"""SGLang's API server in the control directory: that of the tests' SGLang, with a scheduler of the test's own at the end of its pipe."""

from __future__ import annotations

import asyncio
import importlib
import json
import multiprocessing
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.workload.control_directory import QUIESCE_REQUESTED, READY, VARIABLE
from restore_agent.workload.middleware import WARM_UP
from tests.worlds.sglang_sources import install
from tests.worlds.waiting import until

OURS = "restore_agent.workload.sglang.middleware"


class Scheduler:
    """What the API server asks, and when it is answered."""

    def __init__(self, pipe: Connection) -> None:
        self.asked: list[str] = []
        self.idle = True
        self.answers = threading.Event()
        self.answers.set()
        self._pipe = pipe
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        io_struct = sys.modules["sglang.srt.managers.io_struct"]
        while True:
            try:
                request = self._pipe.recv()
            except (EOFError, OSError):
                return
            answer: Any = None
            match request:
                case list():
                    self.asked.append("generate")
                    self.answers.wait()
                    answer = [len(request)]
                case io_struct.FlushCacheReqInput():
                    self.asked.append(f"flush within {request.timeout_s:.0f} s")
                    answer = io_struct.FlushCacheReqOutput(success=self.idle, message="" if self.idle else "1 request is running")
                case io_struct.ReleaseMemoryOccupationReqInput():
                    self.asked.append(f"release {request.tags}")
                case io_struct.ResumeMemoryOccupationReqInput():
                    self.asked.append(f"resume {request.tags}")
            self._pipe.send(answer)


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    """With SGLang's modules, and ours that import them, to be had."""
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    http_server = importlib.import_module("sglang.srt.entrypoints.http_server")
    ours, theirs = multiprocessing.Pipe()
    http_server.set_global_state(http_server._GlobalState(http_server.TokenizerManager(ours)))
    yield Scheduler(theirs)
    ours.close()
    theirs.close()
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang" or name == OURS]:
        del sys.modules[name]


class Served:
    """SGLang's app, as a server runs it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def ask(self, path: str, prompt: str = "") -> tuple[int, Any]:
        said: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": json.dumps({"prompt": prompt}).encode(), "more_body": False}

        async def send(message: Any) -> None:
            said.append(message)

        await self.app({"type": "http", "path": path, "method": "POST"}, receive, send)
        return said[0]["status"], json.loads(said[1]["body"])


@pytest.fixture
async def served(scheduler: Scheduler, tmp_path: Path) -> AsyncIterator[Served]:
    """From its start, as `launch_server` is passed what the hook makes of it."""
    http_server = sys.modules["sglang.srt.entrypoints.http_server"]
    _, named = importlib.import_module(OURS).launching("the server's arguments")
    http_server.app.started_with = "the server's arguments", None, named["execute_warmup_func"]
    stop = asyncio.Event()
    started: list[str] = []

    async def receive() -> Any:
        if started:
            await stop.wait()
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        started.append(message["type"])

    running = asyncio.create_task(http_server.app({"type": "lifespan"}, receive, send))
    yield Served(http_server.app)
    tell(tmp_path, "restore-complete")  # awake at the end: its thread then looks no more than now and then
    await until(lambda: scheduler.asked[-1].startswith("resume"))
    stop.set()
    await running


def tell(folder: Path, word: str) -> None:
    for old in (READY, "restore-complete", QUIESCE_REQUESTED):
        (folder / old).unlink(missing_ok=True)
    (folder / word).touch()


ASLEEP = ["flush within 30 s", "release ['kv_cache']"]


async def test_warm_asleep_awake_and_asleep_again(served: Served, scheduler: Scheduler, tmp_path: Path) -> None:
    await until((tmp_path / READY).exists)
    warm = ["generate"] * sum(path == "/v1/completions" for path, _ in WARM_UP)  # the tests' SGLang has no chat, and refuses it
    assert warm and scheduler.asked == [*warm, *ASLEEP]
    assert (await served.ask("/health"))[0] == 503
    assert (await served.ask("/v1/models"))[0] == 200

    waiting = asyncio.create_task(served.ask("/v1/completions", "abc"))
    await asyncio.sleep(0)
    tell(tmp_path, "restore-complete")
    status, answer = await waiting
    assert (status, answer["choices"][0]["text"]) == (200, "3"), "who asks while it sleeps is answered when it is awake"
    assert scheduler.asked == [*warm, *ASLEEP, "resume ['kv_cache']", "generate"]
    assert (await served.ask("/health"))[0] == 200

    tell(tmp_path, QUIESCE_REQUESTED)
    await until((tmp_path / READY).exists)
    assert scheduler.asked[-2:] == ASLEEP and scheduler.asked.count("generate") == len(warm) + 1, "warmed up once"


async def test_an_answer_under_way_is_given_before_it_sleeps(served: Served, scheduler: Scheduler, tmp_path: Path) -> None:
    await until((tmp_path / READY).exists)
    tell(tmp_path, "restore-complete")
    await until(lambda: scheduler.asked[-1].startswith("resume"))
    await until_healthy(served)
    scheduler.answers.clear()
    under_way = asyncio.create_task(served.ask("/v1/completions", "abcd"))
    await until(lambda: scheduler.asked[-1] == "generate")
    tell(tmp_path, QUIESCE_REQUESTED)
    refused = [asyncio.create_task(served.ask("/health"))]
    while (await refused[-1])[0] == 200:  # until it is falling asleep
        refused.append(asyncio.create_task(served.ask("/health")))
    assert scheduler.asked[-1] == "generate" and not (tmp_path / READY).exists()
    scheduler.answers.set()
    assert (await under_way)[1]["choices"][0]["text"] == "4"
    await until((tmp_path / READY).exists)
    assert scheduler.asked[-3:] == ["generate", *ASLEEP]


async def test_a_scheduler_that_is_not_idle_is_asked_for_nothing_more(scheduler: Scheduler) -> None:
    scheduler.idle = False
    snapshots = importlib.import_module(OURS).Snapshots(SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"not idle after 30 s.*1 request is running"):
        await snapshots.fall_asleep()
    assert scheduler.asked == ASLEEP[:1]


async def until_healthy(served: Served) -> None:
    while (await served.ask("/health"))[0] != 200:
        await asyncio.sleep(0.01)
