"""The view of all nodes, fed by their agents' Watch streams: what stands on which rung, which replicas live, how fast each node is.

A stream that breaks takes nothing away by itself: replicas outlive an agent on Kubernetes. Of what the agent no longer names when the next
stream has synced no agent speaks; nor of the replicas of an agent that is not listed any more, ten seconds on, but for those that another
one names by then: its successor on the same node has another address and the same replicas. Whether a replica of which no agent speaks is
gone, readiness.py decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import Activation, Activations
from scaler.fleet import messages
from scaler.fleet.addresses import Addresses
from scaler.fleet.agent import Agent
from scaler.fleet.readiness import Readiness
from scaler.gateway.dispatcher import Backend
from scaler.gateway.upstream import Endpoint
from scaler.plan.scheduling import Standing
from scaler.plan.world import Node, Replica
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CHANCE, SYSTEM_CLOCK, Clock
from zerowake_shared.phases import Phase
from zerowake_shared.tls import BadCertificate, TlsFiles, client_credentials

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.05, 2.0
_SILENT_SECONDS = 10.0  # an agent says something every two seconds: this is a connection that is dead on one side only
_DOUBT_SECONDS = 3.0  # for one at whose node nothing answers
_SUCCESSOR_SECONDS = 10.0
Dial = Callable[[str, TlsFiles | None], grpc.aio.Channel]
AGENT_NAME = "zerowake-agent"  # in every agent's certificate: they are known by their addresses only


class Nodes:
    """Use `async with nodes.follow(addresses)`; of replicas that become ready, or end, `readiness` is told at once.

    admits: whether a replica may be sent requests; asked again by `reconsider`. dial: makes the channel to an agent.
    """

    def __init__(
        self,
        readiness: Readiness,
        activations: Activations,
        admits: Callable[[Replica], bool] = lambda _: True,
        clock: Clock = SYSTEM_CLOCK,
        chance: random.Random = SYSTEM_CHANCE,
        dial: Dial | None = None,
    ) -> None:
        self._readiness = readiness
        self._activations = activations
        self._admits = admits
        self._clock = clock
        self._chance = chance
        self._dial = dial or dial_agent
        self._agents: dict[str, Agent] = {}
        self._standings: dict[str, Standing] = {}  # by node's name, whether an agent is heard there or not
        self._placed: dict[str, tuple[Node, Standing, Node]] = {}  # by address: as its agent tells it, where it stands, and both
        self._listeners: list[Callable[[Node], None]] = []
        self._room_listeners: list[Callable[[Node], None]] = []
        self._place_listeners: list[Callable[[str], None]] = []

    def __iter__(self) -> Iterator[Node]:
        """The nodes as they are now: values that do not change when news come."""
        return (self._node(agent) for agent in self._agents.values())

    def _node(self, agent: Agent) -> Node:
        told, standing = agent.node, self._standings.get(agent.name)
        if standing is None:
            return told
        before = self._placed.get(agent.address)
        if before is None or before[0] is not told or before[1] is not standing:
            before = self._placed[agent.address] = told, standing, replace(told, standing=standing)
        return before[2]

    def agent(self, address: str) -> Agent | None:
        """The agent of a node, by `Node.address`; None: it is not listed any more."""
        return self._agents.get(address)

    def agent_of(self, replica_id: str) -> Agent | None:
        """The one that has named the replica last, if any does."""
        return next((agent for agent in self._agents.values() if replica_id in agent.replicas), None)

    def on_change(self, callback: Callable[[Node], None]) -> None:
        """Calls `callback(node)` after a replica or a snapshot of the node changed, or its stream synced or broke: of what is there as the
        stream begins once, when it has synced."""
        self._listeners.append(callback)

    def on_room(self, callback: Callable[[Node], None]) -> None:
        """Calls `callback(node)` after the agent of a node said that its GPUs have more or less free."""
        self._room_listeners.append(callback)

    def on_place(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(name)` after the node of that name came to stand otherwise in its cluster."""
        self._place_listeners.append(callback)

    def place(self, name: str, standing: Standing | None) -> None:
        """How the node of that name stands in its cluster; None: the cluster has no such node any more."""
        if standing == self._standings.get(name):
            return
        if standing is None:
            del self._standings[name]
        else:
            self._standings[name] = standing
        for callback in self._place_listeners:
            callback(name)

    def learn(self, address: str, replica: agent_pb2.Replica) -> None:
        """A replica that an answer of the agent names; its stream may name it later."""
        if agent := self._agents.get(address):
            self._apply_replica(agent, replica, agent.add)
            self._tell(agent)

    def ended(self, address: str, replica_id: str) -> None:
        """A replica that the agent has ended for us; its stream may say so later."""
        if agent := self._agents.get(address):
            self._apply(agent, agent_pb2.NodeUpdate(replica=agent_pb2.Replica(id=replica_id, state=agent_pb2.REPLICA_GONE)))

    def reconsider(self, model: str) -> None:
        """Whether its replicas may be sent requests may have changed."""
        for agent in self._agents.values():
            for replica in [each for each in agent.replicas.values() if each.model == model]:
                if self._admits(replica):
                    self._vouch(agent, replica, agent.endpoints[replica.id])
                else:
                    self._readiness.agent_silent(replica.id)

    def _vouch(self, agent: Agent, replica: Replica, endpoint: Endpoint) -> None:
        backend = Backend(replica.id, replica.model, endpoint, agent.name)
        if replica.sleeps is None:
            self._readiness.agent_ready(backend)
        else:
            self._readiness.agent_finds_asleep(backend)

    def doubt(self, node: str) -> None:
        """Nothing answers at a replica of the node: its agent has three seconds to say something, or the node is not counted on."""
        for agent in self._agents.values():
            if node and agent.name == node and agent.patience is not None and not agent.patience.expired():
                until = asyncio.get_running_loop().time() + _DOUBT_SECONDS
                agent.patience.reschedule(min(until, agent.patience.when() or until))

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
                    watching[address] = group.create_task(self._follow(address, self._known(address, tls), tls), name=f"watching {address}")

            try:
                with addresses.told_to(listed):
                    yield
            finally:
                for task in watching.values():
                    task.cancel()

    def _known(self, address: str, tls: TlsFiles | None) -> tuple[Agent, grpc.aio.Channel] | None:
        """An agent that is listed, and the channel to it. None: none can be made now, which is told in the log."""
        try:
            channel = self._dial(address, tls)
        except BadCertificate as error:
            log.error("the agent at %s is not asked yet: %s", address, error)
            return None
        agent = self._agents[address] = Agent(address, agent_pb2_grpc.AgentStub(channel), self._chance)
        return agent, channel

    def _delisted(self, address: str) -> None:
        agent = self._agents.pop(address, None)
        if agent is None:
            return
        self._placed.pop(address, None)
        agent.synced.clear()
        self._tell(agent)
        asyncio.get_running_loop().call_later(_SUCCESSOR_SECONDS, self._left, agent)

    def _left(self, agent: Agent) -> None:
        """The agent is not listed any more, and its successor, if there is one, has said what it has."""
        named = {replica_id for other in self._agents.values() for replica_id in other.replicas}
        for replica_id in agent.replicas.keys() - named:
            self._readiness.agent_silent(replica_id)

    async def _follow(self, address: str, known: tuple[Agent, grpc.aio.Channel] | None, tls: TlsFiles | None) -> None:
        backoff = Backoff(_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS)
        while known is None:
            await asyncio.sleep(backoff.next())
            known = self._known(address, tls)
        agent, channel = known
        try:
            while True:
                try:
                    async for update in self._watch(agent):
                        agent.speaks()
                        self._apply(agent, update)
                        backoff.reset()
                except (grpc.aio.AioRpcError, TimeoutError) as error:
                    agent.silent = agent.silent or isinstance(error, TimeoutError)
                    if agent.synced.is_set():
                        why = error.details() if isinstance(error, grpc.aio.AioRpcError) else "nothing was heard of it"
                        log.warning("lost the agent at %s (%s); trying again", agent.address, why)
                except Exception:  # one agent's fault, or a newer one's word, must not cost the others' replicas
                    log.exception("what the agent at %s said is of no use; asking it again", agent.address)
                if agent.synced.is_set():
                    agent.synced.clear()
                    self._tell(agent)
                    self._readiness.node_silent(agent.name)
                await asyncio.sleep(backoff.next())
                if tls is not None:  # a channel keeps the certificate that it was made with, which may have been renewed
                    channel = await _renewed(channel, agent, tls, self._dial)
        finally:
            await channel.close()

    async def _watch(self, agent: Agent) -> AsyncIterator[agent_pb2.NodeUpdate]:
        """The stream, with the part before `synced` made whole: of what it does not name the agent says nothing any more."""
        replicas, residencies = set(agent.replicas), set(agent.residencies)
        agent.begins()
        async for update in _unless_silent(agent, agent.stub.Watch(agent_pb2.WatchRequest())):
            if not agent.synced.is_set():
                replicas.discard(update.replica.id)
                residencies.discard(messages.name_of(update.residency.snapshot))
            if update.synced:
                for replica_id in replicas:
                    agent.drop(replica_id)
                    self._readiness.agent_silent(replica_id)
                for key in residencies:
                    agent.settle(key, None)
            yield update

    def _apply(self, agent: Agent, update: agent_pb2.NodeUpdate) -> None:
        kind = update.WhichOneof("update")
        if kind == "node":
            if agent.describe(update.node) and agent.synced.is_set():
                for heard in self._room_listeners:
                    heard(self._node(agent))
            return
        if kind == "transfer":
            agent.carry(messages.transfer(update.transfer, self._clock.wall()), ended=not update.transfer.HasField("progress"))
            return
        if kind == "residency":
            told = update.residency
            gone = told.rung == agent_pb2.RUNG_ABSENT
            agent.settle(messages.name_of(told.snapshot), None if gone else messages.residency(told), told.revision)
            if not agent.synced.is_set():
                return  # of a node that has thousands nobody looks at each, before it is known which it has
        elif kind == "replica":
            self._apply_replica(agent, update.replica, agent.hear)
        elif kind == "synced":
            agent.synced.set()
        self._tell(agent)

    def _apply_replica(self, agent: Agent, told: agent_pb2.Replica, take: Callable[[Replica, Endpoint], None]) -> None:
        if told.state in (agent_pb2.REPLICA_READY, agent_pb2.REPLICA_IDLE) and told.id not in agent.gone:
            replica, endpoint = messages.replica(told), messages.endpoint(told.endpoint)
            before = agent.replicas.get(told.id)
            goes_on = before is not None and before.sleeps is None
            replica = replace(replica, since=before.since if before is not None and goes_on else self._clock.now())
            is_new = not agent.knows(told.id) or (before is not None and not goes_on)
            if is_new and replica.sleeps is None:
                agent.note_wake(told)
                if activation := self._activations.current(told.model):
                    activation.made(replica.origin)
                    _account(activation, told.phases, self._clock.now())  # before a held request can end the activation
            take(replica, endpoint)
            if self._admits(replica):
                self._vouch(agent, replica, endpoint)
        elif told.state == agent_pb2.REPLICA_RETIRING:
            self._readiness.agent_retires(told.id)
        elif told.state == agent_pb2.REPLICA_FAILING:
            agent.drop(told.id)  # another one may take its place
            self._readiness.agent_finds_failing(told.id)
        elif told.state == agent_pb2.REPLICA_GONE:
            agent.forget(told.id)
            self._readiness.agent_ended(told.id)

    def _tell(self, agent: Agent) -> None:
        for callback in self._listeners:
            callback(self._node(agent))


async def _unless_silent(agent: Agent, stream: AsyncIterable[agent_pb2.NodeUpdate]) -> AsyncIterator[agent_pb2.NodeUpdate]:
    """Raises: TimeoutError."""
    updates = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(_SILENT_SECONDS) as agent.patience:
                update = await anext(updates)
        except StopAsyncIteration:
            return
        finally:
            agent.patience = None
        yield update


def dial_agent(address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
    """A channel to the agent at a gRPC address. Raises: BadCertificate: `tls` cannot be used."""
    options: list[tuple[str, int | str]] = [
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50 if address.startswith("unix:") else 3000),  # how long it may take to connect
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, client_credentials(tls), [*options, ("grpc.ssl_target_name_override", AGENT_NAME)])


async def _renewed(channel: grpc.aio.Channel, agent: Agent, tls: TlsFiles, dial: Dial) -> grpc.aio.Channel:
    try:
        new = dial(agent.address, tls)
    except BadCertificate as error:
        log.error("the agent at %s is asked with the old certificate: %s", agent.address, error)
        return channel
    await channel.close()
    agent.stub = agent_pb2_grpc.AgentStub(new)
    return new


def _account(activation: Activation, phases: Sequence[agent_pb2.Phase], now: float) -> None:
    """The agent's phases come in parts (image.criu, image.fill, …); an activation has their sums.

    What went by before the first of them is KEDA's, the scheduler's and the kubelet's, which say nothing of it themselves.
    """
    sums: dict[str, float] = {}
    spans: dict[str, tuple[float, float]] = {}
    for phase in phases:
        name = Phase.whole(phase.name)
        sums[name] = sums.get(name, 0.0) + phase.seconds
        first, last = spans.get(name, (phase.begins, phase.ends))
        spans[name] = min(first, phase.begins), max(last, phase.ends)
    # An agent tells times since it began, and it ended as this came: no clock of one machine is held against another's.
    took = max((ends for _, ends in spans.values()), default=0.0)
    measured = took > 0
    if not measured:  # by an earlier agent
        took = sum(sums.values())
    # Where its pod was heard of, the first two have their own, and this is what was left to the kubelet and the runtime.
    activation.mark(Phase.STARTED if Phase.CREATED in activation.phases else Phase.SCHEDULED, now - took)
    for name, seconds in sums.items():
        if name != Phase.UNACCOUNTED:
            begins, ends = spans[name]
            if measured:
                activation.add(name, seconds, now - took + begins, now - took + ends)
            else:
                activation.add(name, seconds)
