"""What goes wrong on a node: a case at a time, after which nothing is left, the memory is what it was, and the next restore works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpumem.client import Client
from gpumem.hardware.devices import devices
from gpumem.hardware.memory import HOST
from tests.worlds.device import World
from tests.worlds.needs import missing_for_criu
from tests.worlds.node import MIB, Node
from tests.worlds.strike import Case

_CASE_SECONDS = 90.0


@pytest.fixture(scope="module", params=[HOST, pytest.param("gpu", marks=pytest.mark.gpu)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Runs a case on the node, all of them in one event loop, each with a deadline."""
    _needs_criu()
    device = HOST if request.param == HOST else devices()[0]
    folder = tmp_path_factory.mktemp("faults")
    pool = (256 if device == HOST else 3072) * MIB
    with asyncio.Runner() as runner:
        started = Node.started(folder, (device,), pool)
        node = runner.run(_within(started.__aenter__()))

        def run(body: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
            try:
                runner.run(_within(_case(node, body)))
            except BaseException:
                print(node.logs())
                raise

        yield run
        runner.run(started.__aexit__(None, None, None))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Of a gpumem that lends the host's memory."""
    world = World(tmp_path, HOST)
    with world.server(pool=256 << 20, arena=0), Client(world.socket, device=HOST) as client:
        yield client


@pytest.fixture
def gpu_only(case: Case, request: pytest.FixtureRequest) -> None:
    """The case is about the GPU: there is nothing of it to be seen on the host's memory."""
    if request.node.callspec.params["case"] == HOST:
        pytest.skip("about a GPU's memory or driver")


async def _within(work: Coroutine[Any, Any, Any]) -> Any:
    async with asyncio.timeout(_CASE_SECONDS):
        return await work


async def _case(node: Node, body: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
    node.fault.unlink(missing_ok=True)
    try:
        async with node.unharmed():
            await body(node)
    finally:
        node.fault.unlink(missing_ok=True)
    await node.restored()  # and what comes after it works
    await node.zero()


def _needs_criu() -> None:
    if missing := missing_for_criu():
        pytest.skip(missing)
