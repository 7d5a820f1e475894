"""A node with 10,000 snapshots on its disk: what it costs to publish one more, and its agent to tell all of them to one who comes, then one
change, and nothing.

The agent is a real one in a process of its own; its snapshots are real ones, too, but small, and lie in memory: what is measured is
processor time and bytes. Who listens is the scaler's own view of nodes, in this process, with a model for each hundredth snapshot.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc

from restore_agent.snapshots.store import Store
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.snapshot_name import SnapshotName
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.plan.world import Model
from scaler.programs.wiring import wire
from tests.bench.figures import Figure
from tests.worlds.agent import running
from tests.worlds.snapshots import publish
from tests.worlds.waiting import until

SNAPSHOTS = 10_000
MODELS = SNAPSHOTS // 100
ROUNDS = 3
CHANGES = 50
_REST_SECONDS = 60.0
_MEMORY = Path("/dev/shm")


def unavailable() -> str:
    return "" if os.geteuid() == 0 else "an agent needs root"


async def main() -> list[Figure]:
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        state = Path(folder) / "state"
        await asyncio.to_thread(fill, state)
        published = await asyncio.to_thread(publishing, state)
        async with running(state) as agent:
            return [
                *published,
                *await told(agent.process.pid, agent.stub),
                *await taken(agent.process.pid, state / "agent.sock", agent.stub),
            ]


class _Filled(Store):
    def _sweep(self) -> None:
        """Nothing is left over, and to look at all that is there after each snapshot would take an hour."""


def fill(state: Path) -> None:
    store = _Filled(state)
    fits = publish(store, b"0" * 4096, "s0").manifest.fits
    for number in range(1, SNAPSHOTS):
        publish(store, number.to_bytes(8, "big") * 512, f"s{number}", fits=fits)
    store.close()


def publishing(state: Path) -> list[Figure]:
    """One more, and away again, in a store that has looked at all of them once."""
    store = Store(state)
    fits = publish(store, b"first" * 1024, "new", replace=True).manifest.fits
    before = time.process_time()
    for number in range(ROUNDS):
        publish(store, number.to_bytes(4, "big") * 1024, "new", replace=True, fits=fits)
    seconds = (time.process_time() - before) / ROUNDS
    before = time.process_time()
    store.remove("default", "new")
    removing = time.process_time() - before
    store.close()
    return [
        Figure("a snapshot of 4 KiB is published beside them: processor time", seconds * 1e3, "ms", detail=f"mean of {ROUNDS}"),
        Figure("it is removed: processor time", removing * 1e3, "ms"),
    ]


async def told(pid: int, stub: agent_pb2_grpc.AgentAsyncStub) -> list[Figure]:
    """By one who only counts."""
    syncs = []
    for _ in range(1 + ROUNDS):
        before, begin, size, count = processor(pid), time.monotonic(), 0, 0
        async for update in stub.Watch(pb.WatchRequest()):
            size, count = size + update.ByteSize(), count + update.HasField("residency")
            if update.synced:
                break
        assert count == SNAPSHOTS
        syncs.append((processor(pid) - before, time.monotonic() - begin, size))
    first, (seconds, took, size) = syncs[0], min(syncs[1:])
    stream = stub.Watch(pb.WatchRequest())
    updates = aiter(stream)
    async for update in updates:
        if update.synced:
            break
    sizes, before = list[int](), processor(pid)
    for number in range(CHANGES):
        await stub.Stage(pb.StageRequest(request_id=f"told {number}", snapshot=named(number), rung=pb.RUNG_MEMORY))
        sizes.append(await the_next(updates, number))
    seconds_of_change = (processor(pid) - before) / CHANGES
    before = processor(pid)
    heard = 0
    try:
        async with asyncio.timeout(_REST_SECONDS):
            async for update in updates:
                heard += update.ByteSize()
    except TimeoutError:
        pass
    stream.cancel()
    rest = (processor(pid) - before) / _REST_SECONDS
    detail = f"{SNAPSHOTS} snapshots, one listener"
    return [
        Figure("a node tells all it has: bytes", size / 1e6, "MB", detail=detail),
        Figure(
            "its agent's processor time", seconds, "s", detail=f"in {took:.1f} s; at the agent's start {first[0]:.1f} s in {first[1]:.1f} s"
        ),
        Figure("one change is told: bytes", sum(sizes) / len(sizes), "B", detail=f"a snapshot that was staged; mean of {CHANGES}"),
        Figure("its agent's processor time", seconds_of_change * 1e3, "ms", detail="the staging of 4 KiB included"),
        Figure("nothing changes: bytes a second", heard / _REST_SECONDS, "B/s", detail="the node itself, every other second"),
        Figure("its agent's processor time", rest * 100, "% of a core", detail=f"over {_REST_SECONDS:.0f} s: looks at the disk"),
    ]


async def the_next(updates: AsyncIterator[pb.NodeUpdate], number: int) -> int:
    """Bytes of the word that the snapshot stands in memory."""
    async for update in updates:
        if update.residency.snapshot.name == f"s{number}" and update.residency.rung == pb.RUNG_MEMORY:
            return int(update.ByteSize())
    raise AssertionError("the stream has ended")


async def taken(pid: int, socket: Path, stub: agent_pb2_grpc.AgentAsyncStub) -> list[Figure]:
    """By a scaler that has models of some of them."""
    names = [f"s{number}" for number in range(100, SNAPSHOTS, 100)]
    models = DeclaredModels({name: Model(name, SnapshotName("default", name), stage=Rung.DISK) for name in names})
    parts = wire(Ledger({name: ModelLimits() for name in models}), models)
    here = time.process_time()
    async with parts.nodes.follow(f"unix:{socket}"):
        await until(lambda: any(node.synced for node in parts.nodes), "the stream is whole", within=600.0)
        synced = time.process_time() - here
        here, changing = time.process_time(), range(101, 101 + CHANGES)
        for number in changing:
            await stub.Stage(pb.StageRequest(request_id=f"taken {number}", snapshot=named(number), rung=pb.RUNG_MEMORY))

        def stand() -> bool:
            there = next(iter(parts.nodes)).residencies
            return all(there[SnapshotName("default", f"s{number}")].rung is Rung.MEMORY for number in changing)

        await until(stand, "all stand in memory")
        change = (time.process_time() - here) / CHANGES
        await parts.planner.close()
    return [
        Figure("a scaler takes all of it in: processor time", synced, "s", detail=f"with {len(models)} models"),
        Figure("a scaler takes one change in: processor time", change * 1e3, "ms", detail="the call that makes it included"),
    ]


def named(number: int) -> pb.SnapshotRef:
    return pb.SnapshotRef(namespace="default", name=f"s{number}")


def processor(pid: int) -> float:
    """Seconds that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
