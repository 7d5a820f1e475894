"""The agent's gRPC service in the test's own process, asked by a real client over a socket; its node has no CRIU to work with."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc

from restore_agent.drivers.criu import CriuError
from restore_agent.drivers.weights import Weights
from restore_agent.sequences.node import Node
from restore_agent.service import metrics
from restore_agent.service.service import AgentService
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.store import Store


@dataclass
class World:
    node: Node
    stub: agent_pb2_grpc.AgentAsyncStub


@contextlib.asynccontextmanager
async def served_node(folder: Path) -> AsyncIterator[World]:
    store = Store(folder / "state")
    node = Node("test", store, folder / "memory", Weights(folder / "gpumem.sock"), CriuError("there is none"), metrics)
    server = grpc.aio.server()
    agent_pb2_grpc.add_AgentServicer_to_server(AgentService(node), server)
    server.add_insecure_port(f"unix:{folder}/agent.sock")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{folder}/agent.sock") as channel:
        yield World(node, agent_pb2_grpc.AgentStub(channel))
    await server.stop(None)
    store.close()


def reference(snapshot: Snapshot) -> pb.SnapshotRef:
    return pb.SnapshotRef(namespace=snapshot.manifest.namespace, name=snapshot.manifest.name, digest=snapshot.digest)


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Status, its text, and the reason in the trailing metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = raised.value
    return error.code(), error.details() or "", dict(error.trailing_metadata() or ()).get("zerowake-reason", "")  # type: ignore[arg-type]
