"""Sandboxes that stand ready: given away once, and only while they are what would be made anew."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.places.sandboxes import Sandboxes
from tests.worlds.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")


@pytest.fixture
async def sandboxes(tmp_path: Path) -> AsyncIterator[Sandboxes]:
    made = Sandboxes(tmp_path / "criu.kdat", tmp_path / "layers", tmp_path / "gpumem.sock", tmp_path / "weights")
    yield made
    await made.close()
    assert list((tmp_path / "layers").iterdir()) == []


async def ready(sandboxes: Sandboxes, shared: Path) -> int:
    """The pid of the one that stands ready then."""
    before = set(sandboxes._ready.values())
    sandboxes.make_ready([str(shared)])
    await until(lambda: set(sandboxes._ready.values()) - before, "a sandbox stands ready")
    (sandbox,) = set(sandboxes._ready.values()) - before
    return sandbox.pid


async def test_it_is_given_away_once(sandboxes: Sandboxes, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    pid = await ready(sandboxes, tmp_path / "logs")
    async with await sandboxes.create([str(tmp_path / "logs")]) as first, await sandboxes.create([str(tmp_path / "logs")]) as second:
        assert first.pid == pid
        assert second.pid != pid
        (first.root / str(tmp_path / "logs/a").lstrip("/")).write_text("shared")
        assert (tmp_path / "logs/a").read_text() == "shared"


async def test_one_of_what_has_changed_is_not_given_away(sandboxes: Sandboxes, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    pid = await ready(sandboxes, tmp_path / "logs")
    async with await sandboxes.create() as other:
        assert other.pid != pid, "it shares another folder"
    (tmp_path / "logs").rename(tmp_path / "old")
    (tmp_path / "logs").mkdir()
    async with await sandboxes.create([str(tmp_path / "logs")]) as fresh:
        assert fresh.pid != pid
        (fresh.root / str(tmp_path / "logs/a").lstrip("/")).write_text("in the new folder")
    assert (tmp_path / "logs/a").exists()


async def test_one_that_has_ended_is_not_given_away(sandboxes: Sandboxes, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    pid = await ready(sandboxes, tmp_path / "logs")
    (sandbox,) = sandboxes._ready.values()
    os.kill(pid, 9)
    await until(lambda: sandbox.has_ended, "it is seen to have ended")
    async with await sandboxes.create([str(tmp_path / "logs")]) as fresh:
        assert fresh.pid != pid


async def test_after_a_burst_one_is_made(sandboxes: Sandboxes, tmp_path: Path) -> None:
    for _ in range(3):
        sandboxes.make_ready()
    await until(lambda: not sandboxes._tasks, "all have been made")
    assert len(sandboxes._ready) == len(list((tmp_path / "layers").iterdir())) == 1


async def test_one_that_nobody_would_take_is_closed_when_the_next_is_made(sandboxes: Sandboxes, tmp_path: Path) -> None:
    def gpumem_starts() -> None:
        (tmp_path / "gpumem.sock").unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "gpumem.sock"))

    gpumem_starts()
    (tmp_path / "logs").mkdir()
    await ready(sandboxes, tmp_path / "logs")
    for killed in (False, True):
        (sandbox,) = sandboxes._ready.values()
        if killed:
            os.kill(sandbox.pid, 9)
            await until(lambda sandbox=sandbox: sandbox.has_ended, "it is seen to have ended")  # type: ignore[misc]
        else:
            gpumem_starts()
        fresh = await ready(sandboxes, tmp_path / "logs")
        assert [each.pid for each in sandboxes._ready.values()] == [fresh]
        assert sandbox.has_ended
        assert len(list((tmp_path / "layers").iterdir())) == 1
