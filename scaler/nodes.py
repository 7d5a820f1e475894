"""The view of all nodes, fed by their agents' Watch streams: what stands on which rung, which replicas live, how fast each node is.

A stream that breaks takes nothing away by itself: replicas outlive an agent on Kubernetes. What the agent no longer names when the next
stream has synced is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

import grpc
from thaw_proto import agent_pb2, agent_pb2_grpc

from scaler.activation import PHASES, Activation, Activations
from scaler.config import SnapshotName
from scaler.replicas import Endpoint, Replica, Replicas

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.05, 2.0
_ORIGINS = {
    agent_pb2.ORIGIN_RESTORED: "restored",
    agent_pb2.ORIGIN_COLD: "cold",
    agent_pb2.ORIGIN_CAPTURED: "captured",
    agent_pb2.ORIGIN_STANDBY: "standby",
}


class Node:
    """One node. `stub` is its agent; `synced` is set while its stream is whole."""

    def __init__(self, address: str, stub: agent_pb2_grpc.AgentAsyncStub) -> None:
        self.address = address
        self.stub = stub
        self.synced = asyncio.Event()
        self.info = agent_pb2.Node()
        self.residencies: dict[tuple[str, str], agent_pb2.Residency] = {}
        self.replicas: dict[str, agent_pb2.Replica] = {}
        self.gone: deque[str] = deque(maxlen=1000)  # ids that ended lately: later news of them is old

    def residency(self, snapshot: SnapshotName) -> agent_pb2.Residency | None:
        return self.residencies.get((snapshot.namespace, snapshot.name))


class Nodes:
    """Use `async with nodes.follow(addresses)`; replicas that become ready, or end, are told to the gateway's view at once."""

    def __init__(self, replicas: Replicas, activations: Activations) -> None:
        self._replicas = replicas
        self._activations = activations
        self._nodes: dict[str, Node] = {}
        self._listeners: list[Callable[[Node], None]] = []

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def on_change(self, callback: Callable[[Node], None]) -> None:
        """Calls `callback(node)` after a replica or a snapshot of the node changed, or its stream synced or broke."""
        self._listeners.append(callback)

    def replicas_of(self, model: str) -> list[tuple[Node, agent_pb2.Replica]]:
        """Live replicas of the model, the oldest first."""
        return [(node, replica) for node in self for replica in node.replicas.values() if replica.model == model]

    def learn(self, node: Node, replica: agent_pb2.Replica) -> None:
        """A replica that an answer of the agent names; its stream may name it later."""
        self._apply(node, agent_pb2.NodeUpdate(replica=replica))

    @contextlib.asynccontextmanager
    async def follow(self, *addresses: str) -> AsyncIterator[None]:
        """Follows the agents at these gRPC addresses until the block ends."""
        options = [
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        async with contextlib.AsyncExitStack() as stack:
            group = await stack.enter_async_context(asyncio.TaskGroup())
            tasks = []
            for address in addresses:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options))
                node = self._nodes[address] = Node(address, agent_pb2_grpc.AgentStub(channel))
                tasks.append(group.create_task(self._follow(node), name=f"watching {address}"))
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def _follow(self, node: Node) -> None:
        retry = _FIRST_RETRY_SECONDS
        while True:
            try:
                async for update in self._watch(node):
                    self._apply(node, update)
                    retry = _FIRST_RETRY_SECONDS
            except grpc.aio.AioRpcError as error:
                if node.synced.is_set():
                    log.warning("lost the agent at %s (%s); trying again", node.address, error.details())
            if node.synced.is_set():
                node.synced.clear()
                self._tell(node)
            await asyncio.sleep(retry)
            retry = min(2 * retry, _LAST_RETRY_SECONDS)

    async def _watch(self, node: Node) -> AsyncIterator[agent_pb2.NodeUpdate]:
        """The stream, with the part before `synced` made whole: what it does not name is gone."""
        replicas, residencies = set(node.replicas), set(node.residencies)
        async for update in node.stub.Watch(agent_pb2.WatchRequest()):
            if not node.synced.is_set():
                replicas.discard(update.replica.id)
                residencies.discard((update.residency.snapshot.namespace, update.residency.snapshot.name))
            if update.synced:
                for replica_id in replicas:
                    yield agent_pb2.NodeUpdate(
                        replica=agent_pb2.Replica(id=replica_id, state=agent_pb2.REPLICA_GONE, detail="agent restarted")
                    )
                for key in residencies:
                    del node.residencies[key]
            yield update

    def _apply(self, node: Node, update: agent_pb2.NodeUpdate) -> None:
        kind = update.WhichOneof("update")
        if kind == "node":
            node.info = update.node
            return
        if kind == "residency":
            key = (update.residency.snapshot.namespace, update.residency.snapshot.name)
            node.residencies[key] = update.residency
            if update.residency.rung == agent_pb2.RUNG_ABSENT:
                del node.residencies[key]
        elif kind == "replica":
            replica = update.replica
            if replica.state == agent_pb2.REPLICA_READY and replica.id not in node.gone:
                if replica.id not in node.replicas and (activation := self._activations.current(replica.model)):
                    _account(activation, replica.phases)  # before a held request can end the activation
                node.replicas[replica.id] = replica
                endpoint = Endpoint(replica.endpoint.host, replica.endpoint.port, replica.endpoint.netns)
                self._replicas.add(Replica(replica.id, replica.model, node.info.name, endpoint, _ORIGINS[replica.origin]))
            elif replica.state == agent_pb2.REPLICA_GONE:
                node.gone.append(replica.id)
                node.replicas.pop(replica.id, None)
                self._replicas.remove(replica.id)
        elif kind == "synced":
            node.synced.set()
        self._tell(node)

    def _tell(self, node: Node) -> None:
        for callback in self._listeners:
            callback(node)


def _account(activation: Activation, phases: Iterable[agent_pb2.Phase]) -> None:
    """The agent's phases come in parts (image.criu, image.fill, …); an activation has their sums."""
    for name in PHASES:
        parts = [phase.seconds for phase in phases if phase.name.partition(".")[0] == name]
        if parts:
            activation.add(name, sum(parts))
