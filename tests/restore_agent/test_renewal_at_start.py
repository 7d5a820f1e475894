"""What is laid out for --renew, in Python programs as they start: no agent, the words said by the test."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import zerowake_native

from restore_agent.workload.renewal import ANSWER_DOOR, RESTORE_COMPLETE, VARIABLE, Return
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


class World:
    """A control directory, and what is laid out, with a program's own `sitecustomize` behind it."""

    def __init__(self, folder: Path) -> None:
        self.control, self.laid, self.own = folder / "control", folder / "laid", folder / "own"
        for each in (self.control, self.laid, self.own):
            each.mkdir()
        workload = files("restore_agent.workload")
        for source, target in (("renewal.py", "zerowake_renewal.py"), ("renewal_at_start.py", "sitecustomize.py")):
            (self.laid / target).write_bytes((workload / source).read_bytes())

    def start(self, program: str, **env: str) -> subprocess.Popen[str]:
        path = f"{self.laid}:{self.own}"
        return subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, VARIABLE: str(self.control), **env},
        )

    def announced(self) -> set[str]:
        return {path.name for path in self.control.glob("renews-*")}

    def restore(self) -> None:
        """The agent's word, and its door."""
        for path in self.control.glob("renews-*"):
            path.unlink()
        (self.control / RESTORE_COMPLETE).write_text(Return.fresh(5, restored=True).encode())
        os.close(os.open(self.control / ANSWER_DOOR, os.O_RDWR | os.O_NONBLOCK))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_program_draws_anew_and_keeps_its_own_start(world: World) -> None:
    (world.own / "sitecustomize.py").write_text("OWN = 'mine'\n")
    os.mkfifo(world.control / ANSWER_DOOR)
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


def test_the_preloaded_part_speaks_for_each_process_and_those_that_it_forks(world: World) -> None:
    os.mkfifo(world.control / ANSWER_DOOR)
    program = "import os; os.fork(); os.write(1, b'%d\\n' % os.getpid()); os.read(0, 1)"
    with world.start(program, LD_PRELOAD=str(zerowake_native.RENEWAL), PYTHONPATH="") as process:
        assert process.stdin and process.stdout
        pids = {int(process.stdout.readline()) for _ in range(2)}
        theirs = {f"renews-{pid}-openssl" for pid in pids}
        blocking_until(lambda: theirs <= world.announced())
        world.restore()
        blocking_until(lambda: theirs == world.announced())
        process.stdin.close()
