"""The embeddings engine with its weights in gpumem: the same answers, nothing held while it sleeps, everything back after."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from gpumem.hardware.memory import HOST
from tests.worlds.demo_engine import Served, assert_can_be_dumped, started
from tests.worlds.device import World
from tests.worlds.waiting import until

TEXTS = ["a short one", "and one that is quite a bit longer than the other, to be padded"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, HOST)
    with world.server(pool=256 << 20):
        yield world


async def embed(engine: Served) -> list[list[float]]:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http,
        http.post(f"{engine.url}/v1/embeddings", json={"input": TEXTS}) as response,
    ):
        assert response.status == 200, await response.text()
        return [one["embedding"] for one in (await response.json())["data"]]


async def health(engine: Served) -> int:
    async with aiohttp.ClientSession() as http, http.get(f"{engine.url}/health") as response:
        return response.status


def mapped(engine: Served) -> bool:
    return "/memfd:gpumem" in Path(f"/proc/{engine.pid}/maps").read_text()


@pytest.mark.parametrize("evicted", [False, True])
async def test_weights_come_back_after_a_snapshot(world: World, embeddings: Served, tmp_path: Path, evicted: bool) -> None:
    control = tmp_path / "control"
    control.mkdir()
    expected = await embed(embeddings)
    env = os.environ | {"GPUMEM_SOCKET": str(world.socket), "SNAPSHOT_CONTROL_DIR": str(control)}
    with started("embeddings.py", env) as engine:
        await until((control / "ready-for-snapshot").exists, "ready-for-snapshot")
        assert not mapped(engine)
        assert_can_be_dumped(engine.pid)
        assert await health(engine) == 503
        (region,) = (await asyncio.to_thread(world.status)).regions
        assert region.leases == 0
        if evicted:
            await asyncio.to_thread(world.evict, region.id)
        waiting = asyncio.create_task(embed(engine))
        (control / "restore-complete").touch()
        assert await waiting == expected
        assert mapped(engine)
        assert await health(engine) == 200
        assert await embed(engine) == expected


async def test_engines_share_one_region(world: World, embeddings: Served) -> None:
    env = os.environ | {"GPUMEM_SOCKET": str(world.socket)}
    with started("embeddings.py", env) as one, started("embeddings.py", env) as other:
        (region,) = (await asyncio.to_thread(world.status)).regions
        assert region.leases == 2
        assert await embed(one) == await embed(other) == await embed(embeddings)
