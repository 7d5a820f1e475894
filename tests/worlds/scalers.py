"""`zerowake serve` as processes: replicas of it, an API server and an agent, over real connections.

The replicas have addresses of their own on the loopback interface, as pods have, and the same ports.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from zerowake_proto import agent_pb2

from tests.worlds.echo_engine import Engine
from tests.worlds.fake_agent import Agent
from tests.worlds.kubernetes_api import Api

ADDRESSES = ("127.0.0.2", "127.0.0.3")
TRIGGER = {"type": "external-push", "metadata": {"scalerAddress": "zerowake-scaler.zerowake:9443", "model": "m", "targetPending": "8"}}


class Node(Agent):
    """An agent that tells of replicas, too."""

    def __init__(self) -> None:
        super().__init__("n1")
        self.replicas: dict[str, agent_pb2.Replica] = {}

    async def Watch(self, request: agent_pb2.WatchRequest, context: Any) -> AsyncIterator[agent_pb2.NodeUpdate]:
        async for update in super().Watch(request, context):
            if update.synced:
                for replica in list(self.replicas.values()):
                    yield agent_pb2.NodeUpdate(replica=replica)
            yield update

    def runs(self, engine: Engine, name: str = "r1", namespace: str = "tenant") -> None:
        self.replicas[name] = agent_pb2.Replica(
            id=name,
            model="m",
            snapshot=agent_pb2.SnapshotRef(namespace=namespace),
            state=agent_pb2.REPLICA_READY,
            origin=agent_pb2.ORIGIN_RESTORED,
            endpoint=agent_pb2.Endpoint(host="127.0.0.1", port=engine.port),
        )
        for queue in self._streams:
            queue.put_nowait(agent_pb2.NodeUpdate(replica=self.replicas[name]))


class Replica:
    """One process of `zerowake serve`."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, ports: dict[str, int], client: aiohttp.ClientSession) -> None:
        self.process = process
        self.keda = f"{address}:{ports['keda']}"
        self._url = f"http://{address}:{ports['listen']}"
        self._push = f"http://{address}:{ports.get('push')}/demand"
        self._metrics = f"http://{address}:{ports['metrics']}"
        self._client = client

    def ask(self, text: str = "hello") -> asyncio.Task[tuple[int, dict[str, Any], dict[str, str]]]:
        async def asking() -> tuple[int, dict[str, Any], dict[str, str]]:
            body = {"model": "m", "messages": [{"role": "user", "content": text}]}
            async with self._client.post(f"{self._url}/v1/chat/completions", json=body) as response:
                return response.status, await response.json(), dict(response.headers)

        return asyncio.create_task(asking())

    async def post(self, told: dict[str, Any], token: str) -> tuple[int, str]:
        """Demand, as another gateway tells it."""
        async with self._client.post(self._push, json=told, headers={"Authorization": f"Bearer {token}"}) as response:
            return response.status, await response.text()

    async def reads(self, path: str, expected: str, within: float = 60.0) -> None:
        """Waits until the page of metrics and probes says so."""
        found = ""
        try:
            async with asyncio.timeout(within):
                while expected not in found:
                    await asyncio.sleep(0.02)
                    try:
                        async with self._client.get(f"{self._metrics}/{path}") as response:
                            found = await response.text()
                    except aiohttp.ClientConnectionError as error:
                        found = str(error)
        except TimeoutError:
            raise AssertionError(f"{path} never said {expected!r} but: {found}") from None

    async def held(self, count: int) -> None:
        await self.reads("metrics", f'zerowake_held_requests{{model="m"}} {count}.0')

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            return await self.process.wait()


@dataclass
class World:
    api: Api
    node: Node
    replicas: list[Replica]


@asynccontextmanager
async def world(folder: Path, *, drain_seconds: float = 20.0, replicas: int = 2) -> AsyncIterator[World]:
    api, node = Api(), Node()
    ports = free_ports("listen", "metrics", "keda", "peers", "push")
    async with AsyncExitStack() as stack:
        kubeconfig = await stack.enter_async_context(api.serve(folder))
        agent = await stack.enter_async_context(node.serve())
        client = await stack.enter_async_context(aiohttp.ClientSession())
        host, _, agent_port = agent.rpartition(":")
        await api.put("endpointslices", endpoint_slice("zerowake-peers", *ADDRESSES[:replicas]))
        await api.put("endpointslices", endpoint_slice("zerowake-agent", host))
        found = []
        for address in ADDRESSES[:replicas]:
            config = {
                "namespace": "zerowake",
                "listen": f"{address}:{ports['listen']}",
                "metrics": f"{address}:{ports['metrics']}",
                "keda": {"listen": f"{address}:{ports['keda']}"},
                "peers": {"listen": f"{address}:{ports['peers']}", "service": "zerowake-peers"},
                "agents": {"service": "zerowake-agent", "port": int(agent_port)},
                "sources": {"hosts": ["127.0.0.1"]},
                "push": {"listen": f"{address}:{ports['push']}"},
                "drain_seconds": drain_seconds,
            }
            path = folder / f"{address}.yaml"
            path.write_text(yaml.safe_dump(config))
            found.append(await stack.enter_async_context(serving(path, kubeconfig, address, ports, client)))
        for each in found:
            await each.reads("readyz", "ok")
            # One that was refused by a peer is ready, and tries again later: what the peer pushes until then is not heard of.
            await each.reads("metrics", f"zerowake_peers_connected {replicas - 1}.0")
        yield World(api, node, found)


@asynccontextmanager
async def serving(
    config: Path, kubeconfig: Path, address: str, ports: dict[str, int], client: aiohttp.ClientSession
) -> AsyncIterator[Replica]:
    environment = os.environ | {"KUBECONFIG": str(kubeconfig), "POD_NAME": f"zerowake-scaler-{address}"}
    program = (sys.executable, "-c", "from scaler.programs.commands import app; app()")  # the room's own commands: no other is needed
    process = await asyncio.create_subprocess_exec(*program, "serve", str(config), env=environment)
    try:
        yield Replica(process, address, ports, client)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def endpoint_slice(service: str, *addresses: str) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": service}
    return {
        "metadata": {"name": f"{service}-abc", "namespace": "zerowake", "labels": labels},
        "endpoints": [{"addresses": [address], "conditions": {"ready": False}} for address in addresses],
    }


def free_ports(*names: str) -> dict[str, int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("0.0.0.0", 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
