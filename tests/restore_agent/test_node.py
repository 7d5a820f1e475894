"""A node in the test's own process: what it tells its observer and its listeners as replicas come and go."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

import pytest

from restore_agent.places.processes import has_ended
from restore_agent.places.sandbox import Sandbox
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.capture import CaptureRequest
from restore_agent.sequences.changes import Change, Removed
from restore_agent.sequences.node import Node
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import NoReplica, Origin, Replica, State
from restore_agent.sequences.standby import Rung
from restore_agent.snapshots.catalog import NotFound, Snapshot
from restore_agent.snapshots.manifest import EngineRecord
from tests.worlds.snapshots import publish
from tests.worlds.waiting import until

pytestmark = pytest.mark.usefixtures("needs_criu")
SERVER = "import http.server as h, sys; h.ThreadingHTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"
ENGINE = EngineRecord(
    command=(sys.executable, "-c", SERVER), env={"PATH": os.environ["PATH"]}, directory="/srv", port=8000, health_path="/"
)


class Heard:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.words: list[tuple[str, ...]] = []
        self.live = 0
        self.waiting: dict[Rung, int] = {}
        self.stood: list[str] = []  # where what was restored was found
        self.captures: list[str] = []  # empty: it was taken; else why not
        self.came: list[tuple[str, int]] = []
        self.failed: list[tuple[str, str]] = []

    def restored(self, model: str, origin: Origin, phases: Iterable[tuple[str, float]], stood: str) -> None:
        assert dict(phases)["image.wake" if origin is Origin.STANDBY else "image.fill"] > 0
        self.words.append((origin.value, model))
        self.stood.append(stood)

    def started_cold(self, model: str) -> None:
        self.words.append(("cold", model))

    def fell_back(self, model: str, reason: str) -> None:
        self.words.append(("fell back", model, reason))

    def captured(self, model: str, seconds: float) -> None:
        assert seconds > 0
        self.captures.append("")

    def capture_failed(self, model: str, reason: str) -> None:
        self.captures.append(reason)

    def staged(self, rung: str, size: int, seconds: float) -> None:
        assert seconds > 0
        self.came.append((rung, size))

    def staging_failed(self, rung: str, reason: str) -> None:
        self.failed.append((rung, reason))

    def replicas_are(self, count: int) -> None:
        self.live = count

    def standbys_are(self, counts: Mapping[Rung, int], parked: Mapping[str, int]) -> None:
        self.waiting = dict(counts)

    def sleepers_are(self, counts: Mapping[Rung, int]) -> None:
        assert not any(counts.values()), "there are no pods"


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def node(tmp_path: Path, heard: Heard) -> AsyncIterator[Node]:
    (tmp_path / "memory").mkdir()
    async with Node.open("test", tmp_path / "state", tmp_path / "memory", tmp_path / "gpumem.sock", heard) as node:
        yield node
    assert list((tmp_path / "memory").iterdir()) == [tmp_path / "memory" / "criu.kdat"]


def drained(changes: asyncio.Queue[Change]) -> list[Change]:
    return [changes.get_nowait() for _ in range(changes.qsize())]


async def test_a_replica_without_a_snapshot_is_started_and_heard_of(node: Node, heard: Heard) -> None:
    with node.changes.heard() as changes:
        replica, failure = await node.restore("tiny", None, ENGINE, "", Phases())
        assert failure is None
        assert (replica.origin, heard.words, heard.live) == (Origin.COLD, [("cold", "tiny")], 1)
        await node.release(replica.id)
        assert drained(changes) == [replica, replica]
        assert (replica.state, heard.live) == (State.GONE, 0)
    with pytest.raises(NoReplica):
        await node.release(replica.id)


async def test_what_was_asked_for_in_vain_is_counted_with_its_reason(node: Node, heard: Heard) -> None:
    replica, failure = await node.restore("tiny", RestoreFailed("not-found", "no such snapshot"), ENGINE, "", Phases())
    assert failure and failure.reason == "not-found"
    assert replica.detail == "no such snapshot"
    assert heard.words == [("fell back", "tiny", "not-found"), ("cold", "tiny")]
    with pytest.raises(RestoreFailed):
        await node.restore("tiny", RestoreFailed("not-found", "no such snapshot"), None, "", Phases())


async def test_a_snapshot_that_cannot_be_restored_starts_by_its_manifest(node: Node, heard: Heard) -> None:
    snapshot = publish(node.store, b"x" * 8192, engine=ENGINE)
    (snapshot.directory / "images/inventory.img").unlink()
    replica, failure = await node.restore("tiny", snapshot, None, "", Phases())
    assert failure and failure.reason == "corrupt"
    assert replica.origin is Origin.COLD
    assert replica.engine.record == ENGINE
    _, failure = await node.restore("tiny", snapshot, None, "", Phases())
    # It is not tried again: it has failed before, or the look at what is on the disk has seen by now what is wrong with it.
    assert failure and ("failed before" in str(failure) or snapshot.digest in node.staging.damaged)
    assert heard.words == [("fell back", "tiny", "corrupt"), ("cold", "tiny"), ("fell back", "tiny", failure.reason), ("cold", "tiny")]
    assert ("memory", "corrupt") in heard.failed
    assert heard.live == 2


async def test_captured_staged_restored_demoted_and_removed(node: Node, heard: Heard) -> None:
    request = CaptureRequest("default", "tiny", "tiny", ENGINE, canary_path="/")
    with node.changes.heard() as changes:
        captured = await node.capture(request, lambda phase, done, total: None, Phases())
        snapshot = captured.snapshot
        assert snapshot in drained(changes)
        await captured.source.place.close()
        captured.source.output.close()
        await node.stage(snapshot)
        assert node.staging.in_memory(snapshot.digest)
        replica, failure = await node.restore("tiny", snapshot, None, "", Phases())
        assert failure is None
        assert (replica.origin, heard.words) == (Origin.RESTORED, [("restored", "tiny")])
        assert await node.demote(replica.id, 0.0) == ""
        assert snapshot.digest in node.standbys
        assert (heard.live, heard.waiting) == (0, {Rung.STANDBY: 1, Rung.PARKED: 0})
        replica, _ = await node.restore("tiny", snapshot, None, "", Phases())
        assert (replica.origin, heard.words[1:]) == (Origin.STANDBY, [("standby", "tiny")]), "its wake is no restore"
        assert heard.stood == ["memory", "standby"]
        assert heard.captures == [""]
        assert {rung for rung, size in heard.came if size} == {"memory"}
        await node.release(replica.id)
        await node.stage(snapshot)
        drained(changes)
        removing = asyncio.create_task(node.remove(snapshot))
        left = await changes.get()
        assert isinstance(left, Snapshot) and left.digest == snapshot.digest, "it leaves memory"
        with pytest.raises(NotFound):  # so whoever hears that, and has it staged again, finds nothing
            node.store.get("default", "tiny")
        await removing
        *_, last = drained(changes)
        assert isinstance(last, Removed) and last.snapshot == snapshot
    assert snapshot.digest not in node.standbys
    assert not node.staging.in_memory(snapshot.digest)
    with pytest.raises(NotFound):
        node.store.get("default", "tiny")


async def test_a_process_that_ends_before_the_dump_is_not_missed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine's compiler may, which was there when the capture looked."""
    compiler = subprocess.Popen(["true"])
    compiler.wait()
    seen = Sandbox.host_pids
    monkeypatch.setattr(Sandbox, "host_pids", lambda sandbox: seen(sandbox) | {4000: compiler.pid})
    request = CaptureRequest("default", "served", "served", ENGINE, canary_path="/")
    captured = await node.capture(request, lambda *_: None, Phases())
    await captured.source.place.close()
    captured.source.output.close()
    assert [process.pid for process in captured.snapshot.manifest.processes] == [captured.snapshot.manifest.root_pid]


async def test_a_child_whose_end_nobody_has_asked_for_is_none_of_those_that_have_to_be_there(node: Node) -> None:
    """Before the dump, and of a replica before it sleeps; what lives is counted all the same."""
    command = (sys.executable, "-m", "tests.worlds.odd_engine", "8000", "ended-child", "child")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd())}
    engine = EngineRecord(command=command, env=env, directory="/", port=8000, health_path="/")
    captured = await node.capture(CaptureRequest("default", "odd", "odd", engine, canary_path="/look"), lambda *_: None, Phases())
    await captured.source.place.close()
    captured.source.output.close()
    snapshot = captured.snapshot
    assert len(snapshot.manifest.processes) == 2 and all(process.command for process in snapshot.manifest.processes)
    await node.stand_by(snapshot, 0.0)
    replica, failure = await node.restore("odd", snapshot, None, "", Phases())
    assert (failure, replica.origin) == (None, Origin.STANDBY)
    (of_helper,) = [process.pid for process in snapshot.manifest.processes if "sleep" in process.command]
    helper = replica.engine.place.host_pids()[of_helper]
    os.kill(helper, signal.SIGKILL)
    await until(lambda: has_ended(helper), "the helper has ended")
    assert await node.demote(replica.id, 0.0) == ""
    replica, failure = await node.restore("odd", snapshot, None, "", Phases())
    assert (failure, replica.origin) == (None, Origin.STANDBY)


async def test_listeners_that_have_left_hear_nothing(node: Node) -> None:
    with node.changes.heard() as changes:
        pass
    snapshot = publish(node.store, b"x" * 8192)
    await node.stage(snapshot)
    assert drained(changes) == []


async def test_closing_the_node_ends_its_replicas(tmp_path: Path, heard: Heard) -> None:
    (tmp_path / "memory").mkdir()
    async with Node.open("test", tmp_path / "state", tmp_path / "memory", tmp_path / "gpumem.sock", heard) as node:
        replica: Replica
        replica, _ = await node.restore("tiny", None, ENGINE, "", Phases())
        netns = Path(replica.engine.place.netns)
        assert netns.exists()
    assert not netns.exists()
    assert replica.detail == "the agent stops"
