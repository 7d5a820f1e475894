"""Eight agents, each a process, and one snapshot: the origin is read once, also where one of them is killed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3

from restore_agent.snapshots.chunks import Chunk, ChunkStore
from tests.worlds.certificates import Authority
from tests.worlds.fleet_agent import FleetAgent, fleet_agent, random_chunks
from tests.worlds.peers import FAST, fleet_files
from tests.worlds.waiting import until

SIZE, CHUNK = 32 << 20, 256 << 10


@contextlib.asynccontextmanager
async def fleet(folder: Path, count: int, rate: float) -> AsyncIterator[tuple[FleetAgent, list[FleetAgent], list[Chunk]]]:
    """An origin that sends so many bytes a second, and agents that have nothing."""
    fleet_files(folder / "tls", Authority("fleet"))
    chunks = random_chunks(folder / "origin", SIZE, CHUNK)
    async with contextlib.AsyncExitStack() as stack:
        names = [f"node-{number}" for number in range(count)]
        origin, *agents = await asyncio.gather(
            stack.enter_async_context(fleet_agent("origin", folder / "origin", folder / "tls", chunks, rate, "--whole")),
            *(stack.enter_async_context(fleet_agent(name, folder / name, folder / "tls", chunks, FAST)) for name in names),
        )
        yield origin, agents, chunks


def is_whole(folder: Path, chunks: list[Chunk]) -> bool:
    store = ChunkStore(folder / "store")
    return all(blake3(store.path(chunk.hash).read_bytes()).hexdigest() == chunk.hash for chunk in chunks)


async def test_eight_read_the_origin_once(tmp_path: Path) -> None:
    async with fleet(tmp_path, 8, 50e6) as (origin, agents, chunks):
        await asyncio.gather(*(agent.fetch(agents, origin) for agent in agents))
        assert await origin.sent() <= 1.1 * SIZE
        sent = sum([await agent.sent() for agent in agents])
        assert sent >= 6.9 * SIZE, "seven eighths of it came from each other"
        assert all(is_whole(tmp_path / agent.name, chunks) for agent in agents)


async def test_one_that_is_killed_in_the_middle_keeps_nobody_from_having_it_all(tmp_path: Path) -> None:
    async with fleet(tmp_path, 4, 20e6) as (origin, [killed, *agents], chunks):
        fetching = [asyncio.create_task(agent.fetch([killed, *agents], origin)) for agent in agents]
        ends = asyncio.create_task(killed.fetch([killed, *agents], origin))
        await until(lambda: any((tmp_path / killed.name / "store").glob("*/*")), "its first chunk")
        killed.process.kill()
        await asyncio.gather(*fetching)
        assert all(is_whole(tmp_path / agent.name, chunks) for agent in agents)
        assert await origin.sent() <= 1.5 * SIZE  # 1.75 where each reads for itself what the killed one had to
        with pytest.raises(ValueError, match=r"Expecting value"):
            await ends
