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

FORKING = """
import os, random, sys, threading
sys.stdin.readline()
for _ in range(10):
    if os.fork() == 0:
        random.seed(7)
        for _ in range(10_000):
            os.stat("/")  # any other thread goes on meanwhile
            random.random()
        os.write(1, b"%r %d\\n" % (random.random(), threading.active_count()))
        os._exit(0)
    os.wait()
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
        world.take_back()
    assert drawn[0] != drawn[1]


def test_nothing_happens_where_nobody_wants_a_snapshot(world: World) -> None:
    program = "import sys, threading; print(threading.active_count(), 'sitecustomize' in sys.modules)"
    with world.start(program) as process:
        assert process.stdout and process.stdout.read() == "1 True\n"
    assert world.announced() == set()


def test_what_is_forked_after_the_restore_keeps_the_seed_that_it_chooses(world: World) -> None:
    world.wait()
    with world.start(FORKING) as process:
        assert process.stdin and process.stdout
        ours = {f"renews-{process.pid}-python"}
        blocking_until(lambda: world.announced() == ours)
        world.restore()
        blocking_until(lambda: world.announced() == ours)
        process.stdin.write("\n")
        process.stdin.flush()
        drawn = [process.stdout.readline() for _ in range(10)]
        assert len(set(drawn)) == 1 and drawn[0].endswith(" 1\n"), "and none has a thread of ours"
        assert world.announced() == ours


def test_what_begins_after_the_restore_is_left_alone(world: World) -> None:
    world.wait()
    (world.control / RESTORE_COMPLETE).write_text("")
    with world.start("import threading; print(threading.active_count())") as process:
        assert process.stdout and process.stdout.read() == "1\n"
    assert world.announced() == set()
