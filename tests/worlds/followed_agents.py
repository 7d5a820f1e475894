"""Agents on real sockets that say what a test has them say, and a scaler's view of their replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.fleet.addresses import Addresses
from scaler.fleet.nodes import Nodes
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Dispatcher
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.tls import TlsFiles, server_credentials


class Agent(agent_pb2_grpc.AgentServicer):
    """One that has replicas by these ids, and says nothing more."""

    def __init__(self, name: str, *replicas: str, port: int = 1) -> None:
        self.name = name
        self.replicas = replicas
        self.port = port
        self.watched = 0
        self.speaks = asyncio.Event()  # again and again, as agents do
        self.breaks = asyncio.Event()  # its stream, once

    @asynccontextmanager
    async def serve(self, tls: TlsFiles | None = None) -> AsyncIterator[str]:
        server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServicer_to_server(self, server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(tls)) if tls else server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)

    async def Watch(self, request: agent_pb2.WatchRequest, context: Any) -> AsyncIterator[agent_pb2.NodeUpdate]:
        self.watched += 1
        yield agent_pb2.NodeUpdate(node=agent_pb2.Node(name=self.name))
        for name in self.replicas:
            yield agent_pb2.NodeUpdate(replica=replica(name, port=self.port))
        yield agent_pb2.NodeUpdate(synced=True)
        while self.speaks.is_set():
            await asyncio.sleep(0.05)
            yield agent_pb2.NodeUpdate(node=agent_pb2.Node(name=self.name))
        await self.breaks.wait()
        self.breaks.clear()


def replica(name: str, namespace: str = "ns", port: int = 1) -> agent_pb2.Replica:
    return agent_pb2.Replica(
        id=name,
        model="m",
        snapshot=agent_pb2.SnapshotRef(namespace=namespace),
        state=agent_pb2.REPLICA_READY,
        origin=agent_pb2.ORIGIN_COLD,
        endpoint=agent_pb2.Endpoint(host="127.0.0.1", port=port),
    )


class View:
    def __init__(self, admits: Any = lambda _: True, clock: Clock = SYSTEM_CLOCK) -> None:
        ledger = Ledger({"m": ModelLimits()})
        self.dispatcher = Dispatcher(ledger)
        self.activations = Activations(clock)
        self.nodes = Nodes(Readiness(self.dispatcher), self.activations, admits, clock)
        self.addresses = Addresses()

    def ready(self) -> set[str]:
        return {each.id for each in self.dispatcher.ready("m")}

    async def until(self, *names: str, within: float = 10.0) -> None:
        try:
            async with asyncio.timeout(within):
                while self.ready() != set(names):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"replicas are {self.ready()} and not {names}") from None


@asynccontextmanager
async def viewing(*agents: Agent, tls: TlsFiles | None = None, server_tls: TlsFiles | None = None) -> AsyncIterator[tuple[View, list[str]]]:
    view, addresses = View(), []
    async with AsyncExitStack() as stack:
        for agent in agents:
            addresses.append(await stack.enter_async_context(agent.serve(server_tls)))
        view.addresses.set(addresses)
        stack.push_async_callback(view.dispatcher.close)
        await stack.enter_async_context(view.nodes.follow_listed(view.addresses, tls))
        yield view, addresses
