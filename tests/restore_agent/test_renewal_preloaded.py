"""renewal.c, preloaded into programs: what C's library draws is new after a restore, and what a program seeds itself stays so. No agent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from restore_agent.workload.renewal import KEEP_SEEDS, RENEWAL_REQUESTED, RESTORE_COMPLETE
from tests.worlds.renewing import World, drawing_server
from tests.worlds.waiting import blocking_until

DRAWN = {"rand", "random", "drand48", "lrand48", "mrand48"}
FORKS = 10


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawing_server(tmp_path_factory.mktemp("drawing"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Server:
    """One that listens, and who waits in it for a restore."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.announces = f"renews-{process.pid}-openssl"
        self._process = process
        self._port = port

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, path: str) -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=30) as answer:
            return json.load(answer)  # type: ignore[no-any-return]


@contextmanager
def server(world: World, program: Path, *seed: str, **env: str) -> Iterator[Server]:
    with world.start_preloaded([program, "0", *seed], **env) as process:
        try:
            assert process.stdout
            yield Server(process, int(process.stdout.readline()))
        finally:
            process.kill()


@contextmanager
def two_restored(world: World, program: Path, word: str = RESTORE_COMPLETE, **env: str) -> Iterator[tuple[Server, Server]]:
    """Which have drawn alike until they are told of a restore, by that word."""
    world.wait()
    with server(world, program, "3", **env) as first, server(world, program, "3", **env) as second:
        both = {first.announces, second.announces}

        def have_announced() -> bool:
            assert not first.has_ended and not second.has_ended
            return world.announced() == both

        blocking_until(have_announced)
        assert first.ask("/draw") == second.ask("/draw")
        world.restore(word)
        blocking_until(have_announced)
        yield first, second


@pytest.mark.parametrize("word", [RESTORE_COMPLETE, RENEWAL_REQUESTED])
def test_what_the_library_draws_is_new(world: World, program: Path, word: str) -> None:
    with two_restored(world, program, word) as (first, second):
        for _ in range(3):
            one, other = first.ask("/draw"), second.ask("/draw")
            assert one.keys() == DRAWN
            assert {name for name in one if one[name] == other[name]} == set()


def test_seeds_stay_where_that_is_asked_for(world: World, program: Path) -> None:
    with two_restored(world, program, **{KEEP_SEEDS: "1"}) as (first, second):
        assert first.ask("/draw") == second.ask("/draw")


def test_what_is_forked_after_the_restore_keeps_the_seed_that_it_chooses(world: World, program: Path) -> None:
    with two_restored(world, program) as (first, second):
        answers = [each.ask("/forked") for each in (first, second) for _ in range(FORKS)]
        assert [each for each in answers if each != answers[0]] == []
        assert world.announced() == {first.announces, second.announces}


def test_what_begins_after_the_restore_keeps_its_seed(world: World, program: Path) -> None:
    world.wait()
    (world.control / RESTORE_COMPLETE).write_text("")
    for _ in range(FORKS):
        with server(world, program, "3") as first, server(world, program, "3") as second:
            assert first.ask("/draw") == second.ask("/draw")
    assert world.announced() == set()


def test_it_speaks_for_each_process_and_those_that_it_forks(world: World) -> None:
    world.wait()
    program = "import os; os.fork(); os.write(1, b'%d\\n' % os.getpid()); os.read(0, 1)"
    with world.start_preloaded([sys.executable, "-c", program]) as process:
        assert process.stdin and process.stdout
        pids = {int(process.stdout.readline()) for _ in range(2)}
        theirs = {f"renews-{pid}-openssl" for pid in pids}
        blocking_until(lambda: theirs <= world.announced())
        world.restore()
        blocking_until(lambda: theirs == world.announced())
        process.stdin.close()


def test_a_folder_whose_name_is_too_long_is_none(world: World, program: Path) -> None:
    with server(world, program, SNAPSHOT_CONTROL_DIR="/x" * 4096) as started:
        assert started.ask("/draw").keys() == DRAWN
