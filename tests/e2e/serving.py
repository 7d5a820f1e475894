"""`zerowake serve` on this machine, against the cluster: two replicas of it, which share their demand."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import yaml

from tests.e2e.plain_model import NAME
from tests.worlds.health import is_well


class Scaler:
    """Two replicas: `url` is the gateway of one, `push` where it is told of demand, `keda` the other's address, `other_url` its gateway.
    `pages`: where both show their metrics."""

    def __init__(self, url: str, keda: str, client: aiohttp.ClientSession, other_url: str, push: str, pages: Sequence[str]) -> None:
        self._push = push
        self.pages = pages
        self.other_url = other_url
        self.url = url
        self.keda = keda
        self._client = client

    def get(self) -> asyncio.Task[int]:
        async def asking() -> int:
            async with self._client.get(f"{self.url}/models/{NAME}/index.html") as response:
                return response.status

        return asyncio.create_task(asking())

    async def post(self, pending: int, token: str) -> int:
        """Demand for the model, as another gateway tells it."""
        told, headers = {"model": NAME, "pending": pending}, {"Authorization": f"Bearer {token}"}
        async with self._client.post(f"{self._push}/demand", json=told, headers=headers) as response:
            return response.status

    def ask(self, count: int) -> list[asyncio.Task[int]]:
        async def asking() -> int:
            async with self._client.post(f"{self.url}/v1/chat/completions", json={"model": NAME, "messages": []}) as response:
                return response.status

        return [asyncio.create_task(asking()) for _ in range(count)]


@asynccontextmanager
async def scaler(
    folder: Path, namespace: str, kubeconfig: str, machine: str, agents: Sequence[str] = ("127.0.0.1:1",)
) -> AsyncIterator[Scaler]:
    """`agents`: addresses of theirs; by default nobody listens there."""
    with ExitStack() as bound:
        sockets = [bound.enter_context(socket.socket()) for _ in range(10)]
        for each in sockets:
            each.bind((machine, 0))
        ports = [each.getsockname()[1] for each in sockets]
    replicas = [dict(zip(("listen", "metrics", "keda", "peers", "push"), ports[start : start + 5], strict=True)) for start in (0, 5)]
    peers = [f"{machine}:{each['peers']}" for each in replicas]
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        for number, each in enumerate(replicas):
            config = {
                "namespace": namespace,
                "listen": f"{machine}:{each['listen']}",
                "metrics": f"{machine}:{each['metrics']}",
                "keda": {"listen": f"{machine}:{each['keda']}"},
                "peers": {"listen": f"{machine}:{each['peers']}", "addresses": peers},
                "agents": {"addresses": list(agents)},
                "push": {"listen": f"{machine}:{each['push']}"},
                "drain_seconds": 0,
            }
            path = folder / f"{number}.yaml"
            path.write_text(yaml.safe_dump(config))
            await stack.enter_async_context(_running(path, {"KUBECONFIG": kubeconfig, "POD_NAME": f"replica-{number}"}))
        for each in replicas:
            async with asyncio.timeout(30):
                while not await is_well(client, f"http://{machine}:{each['metrics']}/readyz"):
                    await asyncio.sleep(0.1)
        urls = [f"http://{machine}:{each['listen']}" for each in replicas]
        pages = [f"{machine}:{each['metrics']}" for each in replicas]
        yield Scaler(urls[0], f"{machine}:{replicas[1]['keda']}", client, urls[1], f"http://{machine}:{replicas[0]['push']}", pages)


@asynccontextmanager
async def _running(config: Path, environment: dict[str, str]) -> AsyncIterator[None]:
    program = (sys.executable, "-c", "from scaler.programs.commands import app; app()", "serve", str(config))
    process = await asyncio.create_subprocess_exec(*program, env=os.environ | environment)
    try:
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
