"""The view of all nodes, fed by their agents' Watch streams: what stands on which rung, which replicas live, how fast each node is.

A stream that breaks takes nothing away by itself: replicas outlive an agent on Kubernetes. What the agent no longer names when the next
stream has synced is gone. An agent that is not listed any more takes its replicas away after ten seconds, but for those that another one
names by then: its successor on the same node has another address and the same replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import PHASES, Activation, Activations
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.addresses import Addresses
from scaler.gateway.dispatcher import Dispatcher, Endpoint, Replica
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK, Clock
from zerowake_shared.tls import BadCertificate, TlsFiles, client_credentials

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.05, 2.0
_SILENT_SECONDS = 20.0  # an agent says something every two seconds: this is a connection that is dead on one side only
_SUCCESSOR_SECONDS = 10.0
AGENT_NAME = "zerowake-agent"  # in every agent's certificate: they are known by their addresses only
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
    """Use `async with nodes.follow(addresses)`; replicas that become ready, or end, are told to the dispatcher at once.

    admits: whether a replica may be sent requests; asked again by `reconsider`.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        activations: Activations,
        admits: Callable[[agent_pb2.Replica], bool] = lambda _: True,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._dispatcher = dispatcher
        self._activations = activations
        self._admits = admits
        self._clock = clock
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

    def reconsider(self, model: str) -> None:
        """Whether its replicas may be sent requests may have changed."""
        for node, replica in self.replicas_of(model):
            if self._admits(replica):
                self._dispatcher.add(_told(node, replica))
            else:
                self._dispatcher.remove(replica.id)

    @contextlib.asynccontextmanager
    async def follow(self, *addresses: str) -> AsyncIterator[None]:
        """Follows the agents at these gRPC addresses until the block ends."""
        listed = Addresses()
        listed.set(addresses)
        async with self.follow_listed(listed):
            yield

    @contextlib.asynccontextmanager
    async def follow_listed(self, addresses: Addresses, tls: TlsFiles | None = None) -> AsyncIterator[None]:
        """Follows the agents that are listed, at each moment, until the block ends. Raises: BadCertificate: `tls` cannot be used."""
        if tls is not None:
            client_credentials(tls)
        watching: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:

            def listed(now: frozenset[str]) -> None:
                for address in watching.keys() - now:
                    watching.pop(address).cancel()
                    self._delisted(address)
                for address in now - watching.keys():
                    channel = _channel(address, tls)
                    node = self._nodes[address] = Node(address, agent_pb2_grpc.AgentStub(channel))
                    watching[address] = group.create_task(self._follow(node, channel, tls), name=f"watching {address}")

            try:
                with addresses.told_to(listed):
                    yield
            finally:
                for task in watching.values():
                    task.cancel()

    def _delisted(self, address: str) -> None:
        node = self._nodes.pop(address)
        node.synced.clear()
        self._tell(node)
        asyncio.get_running_loop().call_later(_SUCCESSOR_SECONDS, self._left, node)

    def _left(self, node: Node) -> None:
        """The agent is not listed any more, and its successor, if there is one, has said what it has."""
        named = {replica_id for other in self for replica_id in other.replicas}
        for replica_id in node.replicas.keys() - named:
            self._dispatcher.remove(replica_id)

    async def _follow(self, node: Node, channel: grpc.aio.Channel, tls: TlsFiles | None) -> None:
        backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS)
        try:
            while True:
                try:
                    async for update in self._watch(node):
                        self._apply(node, update)
                        backoff.reset()
                except (grpc.aio.AioRpcError, TimeoutError) as error:
                    if node.synced.is_set():
                        why = error.details() if isinstance(error, grpc.aio.AioRpcError) else f"silent for {_SILENT_SECONDS:g} s"
                        log.warning("lost the agent at %s (%s); trying again", node.address, why)
                except Exception:  # one agent's fault, or a newer one's word, must not cost the others' replicas
                    log.exception("what the agent at %s said is of no use; asking it again", node.address)
                if node.synced.is_set():
                    node.synced.clear()
                    self._tell(node)
                await asyncio.sleep(backoff.next())
                if tls is not None:  # a channel keeps the certificate that it was made with, which may have been renewed
                    channel = await _renewed(channel, node, tls)
        finally:
            await channel.close()

    async def _watch(self, node: Node) -> AsyncIterator[agent_pb2.NodeUpdate]:
        """The stream, with the part before `synced` made whole: what it does not name is gone."""
        replicas, residencies = set(node.replicas), set(node.residencies)
        async for update in _unless_silent(node.stub.Watch(agent_pb2.WatchRequest())):
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
                    _account(activation, replica.phases, self._clock.now())  # before a held request can end the activation
                node.replicas[replica.id] = replica
                if self._admits(replica):
                    self._dispatcher.add(_told(node, replica))
            elif replica.state == agent_pb2.REPLICA_RETIRING:
                self._dispatcher.retire(replica.id)
            elif replica.state == agent_pb2.REPLICA_GONE:
                node.gone.append(replica.id)
                node.replicas.pop(replica.id, None)
                self._dispatcher.remove(replica.id)
        elif kind == "synced":
            node.synced.set()
        self._tell(node)

    def _tell(self, node: Node) -> None:
        for callback in self._listeners:
            callback(node)


async def _unless_silent(stream: AsyncIterable[agent_pb2.NodeUpdate]) -> AsyncIterator[agent_pb2.NodeUpdate]:
    """Raises: TimeoutError."""
    updates = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(_SILENT_SECONDS):
                update = await anext(updates)
        except StopAsyncIteration:
            return
        yield update


def _channel(address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
    options: list[tuple[str, int | str]] = [
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50 if address.startswith("unix:") else 3000),  # how long it may take to connect
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, client_credentials(tls), [*options, ("grpc.ssl_target_name_override", AGENT_NAME)])


async def _renewed(channel: grpc.aio.Channel, node: Node, tls: TlsFiles) -> grpc.aio.Channel:
    try:
        new = _channel(node.address, tls)
    except BadCertificate as error:
        log.error("the agent at %s is asked with the old certificate: %s", node.address, error)
        return channel
    await channel.close()
    node.stub = agent_pb2_grpc.AgentStub(new)
    return new


def _told(node: Node, replica: agent_pb2.Replica) -> Replica:
    endpoint = Endpoint(replica.endpoint.host, replica.endpoint.port, replica.endpoint.netns)
    return Replica(replica.id, replica.model, node.info.name, endpoint, _ORIGINS.get(replica.origin, "unknown"))


def _account(activation: Activation, phases: Sequence[agent_pb2.Phase], now: float) -> None:
    """The agent's phases come in parts (image.criu, image.fill, …); an activation has their sums.

    What went by before the first of them is KEDA's, the scheduler's and the kubelet's, which say nothing of it themselves.
    """
    sums: dict[str, float] = {}
    for phase in phases:
        name = phase.name.partition(".")[0]
        sums[name] = sums.get(name, 0.0) + phase.seconds
    took = sum(sums.values()) - min(sums.get("image", 0.0), sums.get("weights", 0.0))  # those two go on at the same time
    activation.mark("scheduled", now - took)
    for name, seconds in sums.items():
        if name in PHASES:
            activation.add(name, seconds)
