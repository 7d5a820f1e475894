"""What is laid out for --renew, in Python programs as they start: no agent, the words said by the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.workload.renewal import RESTORE_COMPLETE
from tests.worlds.renewing import World
from tests.worlds.waiting import blocking_until

PROGRAM = """
import os, random, sys
print(sys.modules["sitecustomize"].__dict__.get("OWN"), flush=True)
input()
random.seed(3)
print(os.getpid(), flush=True)
sys.stdin.readline()
print(random.random(), flush=True)
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_program_draws_anew_and_keeps_its_own_start(world: World) -> None:
    (world.own / "sitecustomize.py").write_text("OWN = 'mine'\n")
    world.wait()
    drawn = []
    for _ in range(2):
        with world.start(PROGRAM) as process:
            assert process.stdin and process.stdout
            assert process.stdout.readline() == "mine\n"
            process.stdin.write("\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
            blocking_until(lambda pid=pid: world.announced() == {f"renews-{pid}-python"})  # type: ignore[misc]
            world.restore()
            blocking_until(lambda pid=pid: world.announced() == {f"renews-{pid}-python"})  # type: ignore[misc]
            process.stdin.write("\n")
            process.stdin.flush()
            drawn.append(process.stdout.readline())
        (world.control / RESTORE_COMPLETE).unlink()
        for path in world.control.glob("renews-*"):
            path.unlink()
    assert drawn[0] != drawn[1]


def test_nothing_happens_where_nobody_wants_a_snapshot(world: World) -> None:
    program = "import sys, threading; print(threading.active_count(), 'sitecustomize' in sys.modules)"
    with world.start(program) as process:
        assert process.stdout and process.stdout.read() == "1 True\n"
    assert world.announced() == set()
