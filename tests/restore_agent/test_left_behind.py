"""What a dump would leave behind is found and named: helpers outside of the engine's tree, and what is in the kernel's IPC namespace."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.engine.engine import Engine
from restore_agent.places.left_behind import LeftBehind, ipc_objects, refuse_left_behind
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.manifest import EngineRecord
from tests.worlds.device import ROOT

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="some calls are made by their numbers of x86_64"),
]


@contextlib.asynccontextmanager
async def engine(kdat: Path, *traits: str) -> AsyncIterator[Engine]:
    record = EngineRecord(
        command=(sys.executable, "-m", "tests.worlds.odd_engine", "8000", *traits),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        port=8000,
        health_path="/health",
        ready_timeout_seconds=30,
    )
    async with await Sandbox.create(kdat) as sandbox:
        output = sandbox.output("odd")
        started = await Engine.start(record, sandbox, output, for_snapshot=False)
        await started.wait_healthy()
        yield started
        output.close()


@pytest.mark.parametrize(
    ("trait", "words"),
    [
        ("daemon", r"pid 1\d\d\d \(.*the helper\); have it stay in the foreground"),
        ("background", r"pid 1\d\d\d \(sleep 1000\); have it stay in the foreground"),
        ("semaphores", r"System V semaphores \d+ \(key 0x0\); have it use POSIX"),
        ("message-queue", r"System V message queue \d+ \(key 0x1234\); have it use POSIX"),
        ("shared-memory", r"System V shared memory \d+ \(key 0x0\); have it use POSIX"),
        ("posix-queue", r"POSIX message queue /jobs; have it use POSIX"),
    ],
)
async def test_it_is_named_with_the_way_out(tmp_path: Path, trait: str, words: str) -> None:
    async with engine(tmp_path / "kdat", trait) as odd:
        with pytest.raises(LeftBehind, match=words):
            refuse_left_behind(odd.pid, odd.place.host_pids(), frozenset())
        if trait not in ("daemon", "background"):
            there = ipc_objects(odd.place.host_pids()[odd.pid])
            assert len(there) == 1
            refuse_left_behind(odd.pid, odd.place.host_pids(), there)  # it was there before, and is somebody else's


async def test_children_and_their_sessions_are_carried(tmp_path: Path) -> None:
    async with engine(tmp_path / "kdat", "child", "nothing") as odd:
        assert len(odd.place.host_pids()) == 3
        refuse_left_behind(odd.pid, odd.place.host_pids(), frozenset())


def test_of_what_has_ended_nothing_is_said() -> None:
    assert ipc_objects(2**22 + 1) == frozenset()
    refuse_left_behind(7, {1: os.getpid()}, frozenset())


def test_this_process_is_where_it_was() -> None:
    before = Path("/proc/self/ns/ipc").readlink()
    ipc_objects(os.getpid())
    assert Path("/proc/self/ns/ipc").readlink() == before
