"""An engine in a real sandbox: started, waited for, asked, told of snapshots, stopped, and quoted when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest

from restore_agent.engine.engine import Engine, EngineError
from restore_agent.places.processes import is_stopped
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.manifest import EngineRecord
from restore_agent.workload.control_directory import (
    DOORS,
    GPUS,
    QUIESCE_REQUESTED,
    READY,
    RESTORE_COMPLETE,
    SNAPSHOT_COMPLETE,
    WAKE_BYTES,
    WEIGHTS,
    ControlDirectory,
)
from tests.worlds.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")
PORT = 8000
# Serves /health and /large; /exit ends it. SNAPSHOT_CONTROL_DIR is said in /environment.
SERVER = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/exit":
            print("the engine says why", flush=True)
            os._exit(3)
        body = {"/environment": json.dumps(dict(os.environ)).encode(), "/large": b"x" * (17 << 20)}.get(self.path, b"{}")
        self.send_response(503 if self.path == "/ill" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()
"""


def record(program: str, *, health: str = "/health", timeout: float = 20.0) -> EngineRecord:
    command = (sys.executable, "-c", program, str(PORT))
    return EngineRecord(command=command, env={"PATH": os.environ["PATH"]}, port=PORT, health_path=health, ready_timeout_seconds=timeout)


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with await Sandbox.create(tmp_path / "criu.kdat") as sandbox:
        yield sandbox


async def started(sandbox: Sandbox, wanted: EngineRecord) -> Engine:
    return await Engine.start(wanted, sandbox, sandbox.output("engine"), for_snapshot=True)


@pytest.fixture
async def engine(sandbox: Sandbox) -> AsyncIterator[Engine]:
    engine = await started(sandbox, record(SERVER))
    await engine.wait_healthy()
    yield engine
    engine.output.close()


async def answer(engine: Engine, path: str, body: str = "") -> str:
    async with engine.session() as session:
        return (await engine.ask(session, path, body)).body


async def test_it_is_asked_in_its_own_network_and_knows_where_to_speak_of_snapshots(engine: Engine) -> None:
    env = json.loads(await answer(engine, "/environment"))
    assert env["SNAPSHOT_CONTROL_DIR"] == "/run/zerowake/control"
    assert await answer(engine, "/echo", '{"a": 1}') == '{"a": 1}'
    assert Path(engine.place.netns).readlink() != Path("/proc/self/ns/net").readlink()


async def test_one_that_ends_is_quoted(engine: Engine) -> None:
    with pytest.raises(EngineError):
        await answer(engine, "/exit")
    with pytest.raises(EngineError, match=r"ended: exit code 3\n.*the engine says why"):
        await engine.wait_healthy()


async def test_one_that_is_ill_has_until_its_deadline(sandbox: Sandbox) -> None:
    engine = await started(sandbox, record(SERVER, health="/ill", timeout=1.0))
    with pytest.raises(EngineError, match=r"not healthy within 1 s: /ill answers 503"):
        await engine.wait_healthy()
    engine.output.close()


async def test_an_endless_answer_is_cut(engine: Engine) -> None:
    with pytest.raises(EngineError, match="more than 16 MiB"):
        await answer(engine, "/large")


async def test_one_that_says_nothing_is_quiet_once_it_is_idle(engine: Engine) -> None:
    assert await asyncio.wait_for(engine.wait_quiet(), 20) is False


POLLS = "import threading, time\n" + SERVER.replace(
    "http.server.ThreadingHTTPServer",
    "threading.Thread(target=lambda: [time.sleep(0.02) or sum(range(9000)) for _ in iter(int, 1)], daemon=True).start()\n"
    "http.server.ThreadingHTTPServer",
)


async def test_one_that_does_nothing_at_all_is_idle_sooner_than_one_that_polls(
    sandbox: Sandbox, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that does a little now and again it is seen by a longer look that it does no more than that."""
    monkeypatch.setattr("restore_agent.engine.engine._IDLE_WINDOW", 1e9)
    assert await asyncio.wait_for(engine.wait_quiet(), 20) is False
    async with await Sandbox.create(tmp_path / "other.kdat") as other:
        polls = await started(other, record(POLLS))
        await polls.wait_healthy()
        monkeypatch.setattr("restore_agent.engine.engine._IDLE_SHARE", 1.0)
        monkeypatch.setattr("restore_agent.engine.engine._IDLE_WINDOW", 1.0)
        monkeypatch.setattr("restore_agent.engine.engine._STILL_WINDOW", 1e9)
        assert await asyncio.wait_for(polls.wait_quiet(), 20) is False


async def test_one_that_says_it_is_ready_is_taken_at_its_word(engine: Engine) -> None:
    (engine.place.control_directory / READY).touch()
    assert engine.is_ready
    assert await asyncio.wait_for(engine.wait_quiet(), 1.5) is True


async def test_one_that_works_on_past_its_deadline_is_given_up(sandbox: Sandbox) -> None:
    engine = await started(sandbox, record("while True: pass", timeout=1.0))
    with pytest.raises(EngineError, match="neither wrote ready-for-snapshot nor became idle within 1 s"):
        await engine.wait_quiet()
    engine.output.close()


async def test_asked_to_quiesce_it_has_a_clean_directory_and_is_waited_for(engine: Engine) -> None:
    control = engine.place.control_directory
    for word in (READY, SNAPSHOT_COMPLETE, RESTORE_COMPLETE):
        (control / word).touch()
    quiescing = asyncio.create_task(engine.quiesce())
    await until((control / QUIESCE_REQUESTED).exists)
    assert {path.name for path in control.iterdir()} == {QUIESCE_REQUESTED, *DOORS.values()}
    assert not quiescing.done()
    (control / READY).touch()
    await asyncio.wait_for(quiescing, 5)
    assert {path.name for path in control.iterdir()} == {READY, *DOORS.values()}


async def test_one_that_has_not_heard_yet_that_it_is_woken_wakes_before_it_quiesces(engine: Engine) -> None:
    control, said = engine.place.control_directory, list[str]()
    goes_on, over = threading.Event(), threading.Event()

    class Slow(ControlDirectory):
        """It is not scheduled between its word and the wait for the answer."""

        def _wait(self, words: Iterable[str], door: str, poll_seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
            if over.is_set() or not goes_on.wait(20):
                raise EOFError
            super()._wait(words, door, poll_seconds, meanwhile)

    def take_part() -> None:
        with contextlib.suppress(EOFError):
            Slow(control).take_part(lambda: said.append("quiesce"), lambda moved: said.append("resume"))

    thread = threading.Thread(target=take_part, daemon=True)
    thread.start()
    await until((control / READY).exists)
    engine.woken({})
    quiescing = asyncio.create_task(engine.quiesce())
    await asyncio.sleep(0)  # it has begun
    goes_on.set()
    await asyncio.wait_for(quiescing, 5)
    assert said == ["quiesce", "resume", "quiesce"]
    over.set()
    engine.woken({})
    await asyncio.to_thread(thread.join)


async def test_woken_on_other_gpus_it_finds_them_before_the_word(engine: Engine) -> None:
    engine.woken({"GPU-a": "GPU-b"})
    control = engine.place.control_directory
    assert json.loads((control / GPUS).read_text()) == {"GPU-a": "GPU-b"}
    assert (control / RESTORE_COMPLETE).exists()


async def test_weights_that_it_names_are_paths_and_nonsense_is_an_error(engine: Engine) -> None:
    assert engine.named_weights() == {}
    path = engine.place.control_directory / WEIGHTS
    path.write_text('{"directories": ["/models/one"]}')
    assert engine.named_weights() == {Path("/models/one"): ""}
    path.write_text('{"directories": ["/models/one", "/models/two"], "gpus": {"/models/two": "GPU-b"}}')
    assert engine.named_weights() == {Path("/models/one"): "", Path("/models/two"): "GPU-b"}
    for nonsense in ("{", "[]", '{"directories": 3}', '{"directories": [], "gpus": 3}'):
        path.write_text(nonsense)
        with pytest.raises(EngineError, match=r"weights\.json that is none"):
            engine.named_weights()


async def test_what_its_wake_takes_of_each_gpu_is_read_from_names_alone(engine: Engine) -> None:
    assert engine.wake_bytes() == {}
    one, two = (f"GPU-cc655d53-b392-8db0-ad0f-39ecf088e39{number}" for number in range(2))
    control = engine.place.control_directory
    for name in (f"12-{one}-300", f"13-{one}-4", f"13-{two}-5", f"14-{two}--6", f"15-{two}-{'9' * 13}", "16-GPU-a-7", "nonsense"):
        (control / f"{WAKE_BYTES}{name}").touch()
    os.mkfifo(control / f"{WAKE_BYTES}17-{two}-1")  # which whoever reads it would wait for
    assert engine.wake_bytes() == {one: 304, two: 6}


async def test_stopped_it_stands_still_and_goes_on(engine: Engine) -> None:
    (host,) = [host for pid, host in engine.place.host_pids().items() if pid == engine.pid]
    await asyncio.to_thread(engine.stop)
    assert is_stopped(host)
    engine.go_on()
    assert await answer(engine, "/health") == "{}"


async def test_work_is_given_up_once_the_engine_is_asleep(engine: Engine) -> None:
    assert await engine.unless_ready(asyncio.sleep(0, "done")) == "done"
    waiting = asyncio.create_task(engine.unless_ready(asyncio.Event().wait()))
    (engine.place.control_directory / READY).touch()
    assert await asyncio.wait_for(waiting, 10) is None
