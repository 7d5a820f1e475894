"""The replicas of a node, with real engines in real sandboxes: who ends one, and who hears of it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from restore_agent.engine.engine import Engine
from restore_agent.places.sandbox import Sandbox
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import NoReplica, Origin, Replica, Replicas, State
from restore_agent.snapshots.manifest import EngineRecord
from tests.worlds.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")
SERVER = "import http.server as h, sys; h.ThreadingHTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"


class World:
    """Replicas, and what has been said of them."""

    def __init__(self, kdat: Path) -> None:
        self.kdat = kdat
        self.heard: list[tuple[str, State]] = []
        self.ended = 0
        self.replicas = Replicas(lambda replica: self.heard.append((replica.id, replica.state)), self._ended)

    async def _ended(self) -> None:
        self.ended += 1

    async def add(self, origin: Origin = Origin.COLD, *, program: str = SERVER, patience: float = 20.0) -> Replica:
        return self.takes(await self.engine(program, patience=patience), origin)

    def takes(self, engine: Engine, origin: Origin) -> Replica:
        return self.replicas.add("tiny", None, origin, engine, Phases())

    async def engine(self, program: str, *words: str, patience: float) -> Engine:
        place = await Sandbox.create(self.kdat)
        record = EngineRecord(
            command=(sys.executable, "-c", program, *words),
            env={"PATH": os.environ["PATH"]},
            directory="/srv",
            port=8000,
            health_path="/",
            ready_timeout_seconds=patience,
        )
        return await Engine.start(record, place, place.output("tiny"), for_snapshot=False)

    def kill(self, replica: Replica) -> None:
        os.kill(replica.engine.place.host_pids()[replica.engine.pid], 9)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path / "criu.kdat")
    yield world
    await world.replicas.close()
    assert len(world.replicas) == 0


async def test_a_released_replica_is_gone_with_all_that_was_in_it(world: World) -> None:
    replica = await world.add()
    assert list(world.replicas) == [replica]
    assert world.replicas.get(replica.id) is replica
    netns = Path(replica.engine.place.netns)
    await world.replicas.release(replica.id)
    assert not netns.exists()
    assert replica.detail == "released"
    assert world.heard == [(replica.id, State.READY), (replica.id, State.GONE)]
    assert world.ended == 1
    with pytest.raises(NoReplica, match=replica.id):
        await world.replicas.release(replica.id)


async def test_one_that_ends_by_itself_says_how(world: World) -> None:
    replica = await world.add()
    world.kill(replica)
    await until(lambda: world.ended)
    assert "killed by SIGKILL" in replica.detail
    assert world.heard[-1] == (replica.id, State.GONE)


async def test_a_retired_one_lives_until_it_ends(world: World) -> None:
    replica = await world.add()
    world.replicas.retire(replica.id, "its pod is being deleted")
    world.replicas.retire(replica.id, "and again")
    world.replicas.retire("nobody", "why")
    assert (replica.state, replica.detail) == (State.RETIRING, "its pod is being deleted")
    assert world.heard == [(replica.id, State.READY), (replica.id, State.RETIRING)]
    world.kill(replica)
    await until(lambda: world.ended)
    assert world.heard[-1] == (replica.id, State.GONE)


async def test_a_detached_one_runs_on_for_whoever_took_it(world: World) -> None:
    replica = await world.add()
    taken = world.replicas.detach(replica.id)
    assert taken is replica
    assert len(world.replicas) == 0
    assert world.heard[-1] == (replica.id, State.GONE)
    assert not replica.engine.place.exit_of(replica.engine.pid).done()
    await replica.engine.place.close()
    replica.engine.output.close()
    assert world.ended == 0, "nothing of the list's ended"


async def test_a_restored_one_that_hangs_is_ended(world: World) -> None:
    """Nobody asked it for its health when it was restored: what it holds would be held for ever."""
    replica = await world.add(Origin.RESTORED, program="import time; time.sleep(1000)", patience=0.5)
    await until(lambda: world.ended)
    assert "it was restored, and is ended: " in replica.detail
    assert "not healthy" in replica.detail


async def test_a_restored_one_that_is_busy_with_an_answer_is_not_ended(world: World) -> None:
    """It has one thread, and none for its health: for longer than the five seconds in which that is to be answered."""
    program = (Path(__file__).parents[1] / "worlds/streaming_engine.py").read_text()
    engine = await world.engine(program, "8000", "alone", patience=0.5)
    while not await engine.is_healthy():
        await asyncio.sleep(0.05)  # until it listens
    async with engine.session() as session:
        stream = asyncio.create_task(engine.ask(session, "/stream?n=90&every=0.1"))
        await until(engine.clients)
        replica = world.takes(engine, Origin.RESTORED)
        await until(lambda: replica.state is State.FAILING)
        assert (await stream).body.count("data: ") == 90
        await until(lambda: replica.state is State.READY)
    assert [state for _, state in world.heard] == [State.READY, State.FAILING, State.READY]
    assert world.ended == 0


async def test_closing_ends_them_all_at_once(world: World) -> None:
    replicas = [await world.add() for _ in range(3)]
    await asyncio.wait_for(world.replicas.close(), 10)
    assert {replica.detail for replica in replicas} == {"the agent stops"}
    assert world.ended == 3
