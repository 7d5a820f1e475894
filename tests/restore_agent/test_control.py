"""The agent's side of the control directory, and an engine's thread on the other side of its doors."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.engine.control import Control
from restore_agent.workload import control_directory
from restore_agent.workload.control_directory import (
    ANSWER_DOOR,
    DOORS,
    QUIESCE_REQUESTED,
    READY,
    REQUEST_DOOR,
    RESTORE_COMPLETE,
    SNAPSHOT_COMPLETE,
    ControlDirectory,
)
from tests.worlds.processes import stands_in_open
from tests.worlds.waiting import until

PID = 7


class Ended(Exception):
    """The engine is over, as far as a test is concerned."""


class World:
    """A place that is a folder, and a thread in the engine's part. One that would poll would sleep, which ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.place: Any = SimpleNamespace(control_directory=folder, exit_of=lambda pid: {PID: self.exit}[pid])
        self.control = Control(self.place, PID)
        self.said: list[str] = []
        self.over = False
        self._engine: threading.Thread | None = None

    def starts(self) -> None:
        self._engine = threading.Thread(target=self._take_part, daemon=True)
        self._engine.start()

    def _take_part(self) -> None:
        try:
            ControlDirectory(self.folder).take_part(self._quiesce, self._resume)
        except Ended:
            self.said.append("ended")

    def _quiesce(self) -> None:
        if self.over:
            raise Ended
        self.said.append("quiesce")

    def _resume(self, moved: Mapping[str, str]) -> None:
        self.said.append("resume")

    def polled(self, seconds: float) -> None:
        self.said.append(f"polls every {seconds} s")
        raise Ended

    def waits(self) -> bool:
        """Whether its thread stands in `open`, where it costs nothing."""
        assert self._engine is not None
        return stands_in_open(os.getpid(), self._engine.native_id or 0)

    def open_doors(self) -> set[str]:
        held = {str(link) for fd in Path("/proc/self/fd").iterdir() if (link := _target(fd))}
        return {name for name in DOORS.values() if str(self.folder / name) in held}

    async def ends(self) -> None:
        self.over = True
        self.control.take_back(RESTORE_COMPLETE, SNAPSHOT_COMPLETE)
        self.control.say(QUIESCE_REQUESTED)
        await until(lambda: self.said[-1] == "ended")


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    world = World(tmp_path)
    monkeypatch.setattr(control_directory, "time", SimpleNamespace(sleep=world.polled))
    Control.make_doors(world.place)
    yield world
    world.exit.cancel()
    await until(lambda: not world.open_doors())


async def test_an_engine_waits_at_its_doors_and_is_let_through(world: World) -> None:
    world.starts()
    await until(world.waits)
    assert world.control.is_ready and world.open_doors() == set()
    world.control.say(RESTORE_COMPLETE)
    await until(lambda: world.said == ["quiesce", "resume"])
    await until(world.waits)
    assert world.open_doors() == {ANSWER_DOOR}, "for as long as the word stands, and it waits at the other"
    await world.ends()


async def test_a_word_that_was_said_before_is_not_missed(world: World) -> None:
    world.control.say(SNAPSHOT_COMPLETE)
    world.starts()
    await until(lambda: world.said == ["quiesce", "resume"])
    await until(world.waits)
    await world.ends()


async def test_what_is_taken_back_shuts_the_door_again(world: World) -> None:
    world.starts()
    for _ in range(3):
        await until(lambda: world.waits() and world.said[-1] == "quiesce")
        world.control.say(RESTORE_COMPLETE)
        await until(lambda: world.waits() and world.said[-1] == "resume")
        world.control.take_back(READY, SNAPSHOT_COMPLETE, RESTORE_COMPLETE)
        assert world.open_doors() == set()
        world.control.say(QUIESCE_REQUESTED)
        await until(lambda: world.control.is_ready)
        assert world.open_doors() == {REQUEST_DOOR}
        world.control.take_back(QUIESCE_REQUESTED)
        assert {path.name for path in world.folder.iterdir()} == {*DOORS.values(), READY, f"renews-{os.getpid()}-python"}
    world.control.say(RESTORE_COMPLETE)
    await until(lambda: world.waits() and world.said[-1] == "resume")
    await world.ends()


async def test_an_engine_that_has_ended_leaves_no_door_open(world: World) -> None:
    world.control.say(RESTORE_COMPLETE)
    assert world.open_doors() == {ANSWER_DOOR}
    world.exit.set_result(0)
    await until(lambda: not world.open_doors())
    world.control.say(QUIESCE_REQUESTED)
    world.control.take_back(QUIESCE_REQUESTED)


async def test_an_engine_that_nobody_knows_any_more_leaves_none_either(world: World) -> None:
    world.control.say(RESTORE_COMPLETE)
    world.exit = asyncio.get_running_loop().create_future()  # the one that had the engine's end is forgotten
    world.control = Control(world.place, PID)
    gc.collect()
    assert world.open_doors() == set()


@pytest.mark.parametrize("word", [RESTORE_COMPLETE, SNAPSHOT_COMPLETE])
async def test_whoever_takes_an_engine_over_opens_the_doors_of_words_that_stand(world: World, word: str) -> None:
    """An agent that was killed has shut its doors, perhaps before the engine stood at them."""
    world.starts()
    await until(world.waits)
    world.control.write(word, "")
    world.control = Control(world.place, PID)
    assert world.waits() and world.open_doors() == set()
    world.control.reopen()
    await until(lambda: world.said == ["quiesce", "resume"])
    await until(world.waits)
    assert world.open_doors() == {ANSWER_DOOR}, "nobody has said anything else"
    world.control.take_back(READY, word)
    world.control.write(QUIESCE_REQUESTED, "")
    world.control.reopen()
    await until(lambda: world.control.is_ready)
    assert world.open_doors() == {REQUEST_DOOR}
    world.control.take_back(QUIESCE_REQUESTED)
    world.control.say(RESTORE_COMPLETE)
    await until(lambda: world.said == ["quiesce", "resume"] * 2)
    await until(world.waits)
    await world.ends()


async def test_what_a_tenant_has_put_there_is_not_followed(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the node's")
    (tmp_path / ANSWER_DOOR).unlink()
    (tmp_path / ANSWER_DOOR).symlink_to(secret)
    (tmp_path / f".{RESTORE_COMPLETE}").symlink_to(secret)
    world.control.say(RESTORE_COMPLETE)
    assert world.open_doors() == set()
    assert (tmp_path / RESTORE_COMPLETE).read_text() == ""
    assert secret.read_text() == "the node's"


async def test_doors_are_made_once(world: World) -> None:
    Control.make_doors(world.place)
    assert {path.name for path in world.folder.iterdir() if path.is_fifo()} == set(DOORS.values())
