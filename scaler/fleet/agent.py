"""One node's agent: what it has said of its node, and the calls by which it is asked to do something.

What is heard is kept as it comes and shown as one frozen value (`node`), which is made when somebody looks and kept until something new is
heard. Errors of gRPC end here, too: a call raises an AgentError that says in the agent's own words what happened.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet import messages
from scaler.fleet.messages import Kept
from scaler.fleet.snapshot_peers import SnapshotPeer
from scaler.gateway.upstream import Endpoint
from scaler.plan.rungs import Rung
from scaler.plan.world import Node, Replica, Residency, Transfer
from zerowake_shared.clock import SYSTEM_CHANCE, token

_REMEMBERED = 1000  # ids of replicas that have ended: later news of them is old
_NEW_SHARE = 0.3  # of what was measured last in what is smoothed
_SILENT_SECONDS = 30.0
_LOOK_SECONDS, _LOOKS = 10.0, 3  # a call is given up after so many in a row at which its agent had said nothing new
_AT_ONCE = 1e-3  # seconds; 0 has another meaning
_T = TypeVar("_T")


class AgentError(Exception):
    """The agent did not do what it was asked; the text says why. reason: the agent's key of that; empty: it gave none."""

    reason = ""


class AgentUnreachable(AgentError):
    """The agent does not answer."""


class AgentSilent(AgentUnreachable):
    """The agent was asked, its stream said nothing more, and so the answer is not waited for."""


class NoRoom(AgentError):
    """What it was asked for needs more than the node has free."""


class Wanted(AgentError):
    """What it was asked to put to sleep is in use just now."""


class HasNone(AgentError):
    """The agent has no snapshot or replica of that name."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine is started where its snapshot cannot be restored. ready_seconds: until it has to be healthy."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    directory: str
    port: int
    health_path: str
    ready_seconds: float
    shared: tuple[str, ...] = ()  # folders that stay the machine's own


class Agent:
    """One agent. `stub` is its gRPC client; `synced` is set while its stream is whole."""

    def __init__(self, address: str, stub: agent_pb2_grpc.AgentAsyncStub, chance: random.Random = SYSTEM_CHANCE) -> None:
        self.address = address
        self.stub = stub
        self._chance = chance
        self.synced = asyncio.Event()
        self.silent = False  # nothing came any more
        self._words = 0  # that its stream has said
        self.patience: asyncio.Timeout | None = None  # in which the stream's next word has to come
        self.residencies: dict[SnapshotName, Residency] = {}
        self.replicas: dict[str, Replica] = {}
        self._transfers: dict[tuple[SnapshotName, Rung], Transfer] = {}
        self.endpoints: dict[str, Endpoint] = {}  # of its replicas
        self.gone: deque[str] = deque(maxlen=_REMEMBERED)
        self._restoring: Counter[str] = Counter()  # restores that are not answered yet, by model
        self._early: dict[str, tuple[Replica, Endpoint]] = {}  # replicas that the stream has named while one was
        self._revisions: dict[SnapshotName, int] = {}  # of what was said last of each, in this stream or since
        self._parked_overheads: dict[str, float] = {}  # by digest: seconds of waking a parked one beside its weights, smoothed
        self._fetch_rate = 0.0  # bytes a second of snapshots that came to it, smoothed: where its agent is an older one, which does not say
        self._told = Node(address)
        self._shown: Node | None = None

    @property
    def name(self) -> str:
        """The node's name; empty until the agent has said it."""
        return self._told.name

    @property
    def node(self) -> Node:
        """All that is known of the node, as it is now."""
        shown, synced = self._shown, self.synced.is_set()
        if shown is None or (shown.synced, shown.silent) != (synced, self.silent):
            shown = self._shown = replace(
                self._told,
                synced=synced,
                silent=self.silent,
                rates=replace(self._told.rates, remote_to_disk=self._told.rates.remote_to_disk or self._fetch_rate),
                residencies=MappingProxyType(dict(self.residencies)),
                replicas=MappingProxyType(dict(self.replicas)),
                transfers=tuple(self._transfers.values()),
            )
        return shown

    def begins(self) -> None:
        """A stream of it begins, maybe another program's, which counts what it says anew."""
        self._revisions.clear()
        self._transfers.clear()
        self._shown = None

    def speaks(self) -> None:
        """Its stream has said something."""
        self.silent = False
        self._words += 1

    def describe(self, told: agent_pb2.Node) -> None:
        """Takes what the agent says of the node itself."""
        self._told = Node(
            self.address,
            name=told.name,
            memory_total_bytes=told.memory_total_bytes,
            memory_free_bytes=told.memory_free_bytes,
            gpus=messages.gpus(told),
            rates=messages.rates(told.bandwidths),
            peer_address=messages.peer_address(told, self.address),
            sources=messages.sources(told),
            staged_bytes=messages.known(told, "staged_bytes"),
            staged_limit_bytes=messages.known(told, "staged_limit_bytes"),
        )
        self._shown = None

    def settle(self, snapshot: SnapshotName, residency: Residency | None, revision: int = 0) -> None:
        """Where a snapshot stands now; None: not on this node any more. revision: of who said so: the stream and an answer overtake each
        other, and what was said before counts no more; 0: nothing was said later.
        """
        if revision and revision < self._revisions.get(snapshot, 0):
            return
        self._revisions[snapshot] = revision
        if residency is None:
            self.residencies.pop(snapshot, None)
        else:
            overhead = self._parked_overheads.get(residency.digest, 0.0)
            self.residencies[snapshot] = replace(residency, parked_overhead_seconds=overhead)
        self._shown = None

    def carry(self, transfer: Transfer, *, ended: bool) -> None:
        """Takes how far a snapshot is that comes up, or that it does not come any more."""
        if ended:
            self._transfers.pop((transfer.snapshot, transfer.rung), None)
        else:
            self._transfers[transfer.snapshot, transfer.rung] = transfer
        self._shown = None

    def note_wake(self, told: agent_pb2.Replica) -> None:
        """Of a replica that is new: takes from its phases how long waking a parked one takes here. What a restore takes, the agent says."""
        if told.origin != agent_pb2.ORIGIN_PARKED or not told.snapshot.digest:
            return
        seconds = messages.seconds_beside_weights(told)
        before = self._parked_overheads.get(told.snapshot.digest, seconds)
        self._parked_overheads[told.snapshot.digest] = before + _NEW_SHARE * (seconds - before)

    def note_fetch(self, size: int, seconds: float) -> None:
        """So many bytes of a snapshot have come from other nodes in that time."""
        if size and seconds > 0:
            before = self._fetch_rate or size / seconds
            self._fetch_rate = before + _NEW_SHARE * (size / seconds - before)
            self._shown = None

    def add(self, replica: Replica, endpoint: Endpoint) -> None:
        self._early.pop(replica.id, None)
        self.replicas[replica.id] = replica
        self.endpoints[replica.id] = endpoint
        self._shown = None

    def hear(self, replica: Replica, endpoint: Endpoint) -> None:
        """Takes a ready replica that the stream names. It may be what a restore under way has made, and the stream sooner than the answer:
        among the node's replicas it would be counted twice then, so it waits for the answers.
        """
        if self._restoring[replica.model] and replica.id not in self.replicas:
            self._early[replica.id] = replica, endpoint
        else:
            self.add(replica, endpoint)

    def knows(self, replica_id: str) -> bool:
        """Whether the replica was named already."""
        return replica_id in self.replicas or replica_id in self._early

    def forget(self, replica_id: str) -> None:
        """The replica has ended."""
        self.gone.append(replica_id)
        self.drop(replica_id)

    def drop(self, replica_id: str) -> None:
        """The agent says nothing of the replica any more, and may name it again."""
        self._early.pop(replica_id, None)
        self.replicas.pop(replica_id, None)
        self.endpoints.pop(replica_id, None)
        self._shown = None

    async def stage(
        self,
        snapshot: SnapshotName,
        digest: str,
        rung: Rung,
        peers: Iterable[SnapshotPeer] = (),
        stores: Iterable[str] = (),
        complained: Callable[[str], None] = lambda why: None,
        *,
        urgent: bool = False,
    ) -> float:
        """The snapshot up to the rung, fetched from `peers` and `stores` (URLs) where the node does not have it; returns the seconds that
        it took. `complained`: hears what some of them did wrong while others gave it. `urgent`: a request waits for it.

        Raises AgentError; AgentSilent: nothing was heard of the agent meanwhile.
        """
        reference = messages.reference(snapshot, digest)
        request = agent_pb2.StageRequest(request_id=self._id(), snapshot=reference, rung=agent_pb2.Rung.Name(rung), urgent=urgent)
        request.stores.extend(stores)
        request.peers.extend(agent_pb2.Peer(node=peer.node, address=peer.address, complete=peer.complete) for peer in peers)
        try:
            answer = await self._while_heard(self.stub.Stage(request))
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None
        for why in answer.complaints:
            complained(why)
        # The stream says so, too: maybe later, and maybe it has said by now that the snapshot is gone again.
        self.settle(snapshot, messages.residency(answer.residency), answer.residency.revision)
        return answer.seconds

    async def find(self, snapshot: SnapshotName, store: str) -> Kept:
        """What the store, a URL, has under the name; the agent has verified it. Empty: what its node has.

        Raises AgentError, whose reason says what the store did.
        """
        request = agent_pb2.FindRequest(request_id=self._id(), snapshot=messages.reference(snapshot), store=store)
        try:
            return messages.kept(store, await self._while_heard(self.stub.Find(request)))
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None

    async def take(self, model: str, snapshot: SnapshotName, engine: Engine, canary: str, adapters: Iterable[str], template: str) -> None:
        """A snapshot of an engine that is started for it, in the place of the one of that name.

        canary: PATH or PATH=JSON; template: a hash of what the engine is started from. Raises AgentError.
        """
        path, _, body = canary.partition("=")
        request = agent_pb2.SnapshotRequest(
            request_id=self._id(),
            snapshot=messages.reference(snapshot),
            model=model,
            engine=_told(engine),
            canary=agent_pb2.Canary(path=path, body=body.encode()),
            adapters=adapters,
            replace=True,
            template_hash=template,
        )
        try:
            async for _ in self.stub.Snapshot(request):
                """Its progress the agent's own log has."""
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None

    async def push(self, snapshot: SnapshotName, digest: str, store: str) -> float:
        """The snapshot into a store; returns the seconds that it took. Raises AgentError, whose reason says what the store did."""
        request = agent_pb2.PushRequest(request_id=self._id(), snapshot=messages.reference(snapshot, digest), store=store)
        updates = aiter(self.stub.Push(request))
        try:
            while True:
                async with asyncio.timeout(_SILENT_SECONDS):  # it says several times a second how far it is
                    update = await anext(updates)
                if update.HasField("result"):
                    return update.result.seconds
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None
        except (TimeoutError, StopAsyncIteration):
            raise AgentUnreachable("nothing is heard of its agent any more") from None

    async def unstage(self, snapshot: SnapshotName, digest: str, *, seconds: float) -> None:
        """The snapshot off the node, within so many seconds. Raises AgentError."""
        reference = messages.reference(snapshot, digest)
        request = agent_pb2.UnstageRequest(request_id=self._id(), snapshot=reference, rung=agent_pb2.RUNG_ABSENT)
        try:
            await self.stub.Unstage(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None

    async def restore(self, model: str, snapshot: SnapshotName | None, cold: Engine | None, activation: str) -> agent_pb2.RestoreResponse:
        """One ready replica. Raises AgentError."""
        request = agent_pb2.RestoreRequest(request_id=self._id(), activation_id=activation, model=model)
        if snapshot is not None:
            request.snapshot.CopyFrom(messages.reference(snapshot))
        if cold is not None:
            request.cold.CopyFrom(_told(cold))
        self._restoring[model] += 1
        try:
            return await self.stub.Restore(request)
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None
        finally:
            self._restoring[model] -= 1
            if not self._restoring[model]:
                self._settle_early(model)

    def _settle_early(self, model: str) -> None:
        """No restore is under way any more: what the stream has named are replicas, whoever asked for them."""
        for replica, endpoint in [each for each in self._early.values() if each[0].model == model]:
            self.add(replica, endpoint)

    async def release(self, replica_id: str) -> None:
        """The replica ends. Raises AgentError."""
        try:
            await self.stub.Release(agent_pb2.ReleaseRequest(request_id=self._id(), replica_id=replica_id))
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None

    async def stand_by(self, replica_id: str, seconds: float) -> None:
        """The replica is kept as a standby for so long (0: until it is used), or ends where it cannot be. Raises AgentError."""
        await self._demote(agent_pb2.DemoteRequest(replica_id=replica_id, rung=agent_pb2.RUNG_STANDBY, keep_seconds=seconds))

    async def park(self, replica_id: str, seconds: float, standby_seconds: float | None) -> None:
        """The replica is kept parked for so long (0: until it is used, or its room is wanted), and then as a standby for so long (0: until
        it is used; None: not at all). Raises AgentError: it cannot be, and goes on.
        """
        # 0 is for ever there: one that is not to be a standby is one for the shortest time.
        then = _AT_ONCE if standby_seconds is None else standby_seconds
        request = agent_pb2.DemoteRequest(replica_id=replica_id, rung=agent_pb2.RUNG_PARKED, keep_seconds=seconds, standby_seconds=then)
        await self._demote(request)

    async def sleep(self, replica_id: str, rung: Rung) -> None:
        """The replica sleeps in its pod, on the rung. Raises AgentError: it goes on, or is gone, which its stream says."""
        await self._demote(agent_pb2.DemoteRequest(replica_id=replica_id, rung=agent_pb2.Rung.Name(rung)))

    async def wake(self, replica_id: str, activation: str) -> agent_pb2.Replica:
        """One that sleeps in its pod serves again. Raises AgentError: NoRoom, AgentUnreachable: it sleeps on; else it is gone."""
        try:
            answer = await self.stub.Wake(agent_pb2.WakeRequest(request_id=self._id(), replica_id=replica_id, activation_id=activation))
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None
        return answer.replica

    async def _demote(self, request: agent_pb2.DemoteRequest) -> None:
        request.request_id = self._id()
        try:
            await self.stub.Demote(request)
        except grpc.aio.AioRpcError as error:
            raise _said(error) from None

    async def _while_heard(self, call: Awaitable[_T]) -> _T:
        """What the call answers, however long that takes, for as long as the stream says something: an agent says every two seconds how its
        node is. A look that comes late, as this program stood still, finds nothing said either, so it takes several.

        Raises AgentSilent, and what the call raises.
        """
        answer = asyncio.ensure_future(call)
        words, looks = self._words, 0
        try:
            while looks < _LOOKS:
                done, _ = await asyncio.wait([answer], timeout=_LOOK_SECONDS)
                if done:
                    return answer.result()
                looks = looks + 1 if self._words == words else 0
                words = self._words
        finally:
            answer.cancel()
        raise AgentSilent(
            f"its agent was asked and has said nothing for {_LOOKS * _LOOK_SECONDS:.0f} s; it is not waited for: "
            "see whether the node runs and is reached, and what its agent logs"
        )

    def _id(self) -> str:
        """Of a request: the agent does it once, however often it is sent."""
        return token(self._chance, 8)


def _told(engine: Engine) -> agent_pb2.Engine:
    return agent_pb2.Engine(
        command=engine.command,
        env=engine.env,
        directory=engine.directory,
        shared=engine.shared,
        port=engine.port,
        health_path=engine.health_path,
        ready_timeout_seconds=engine.ready_seconds,
    )


def _said(error: grpc.aio.AioRpcError) -> AgentError:
    kinds = {
        grpc.StatusCode.UNAVAILABLE: AgentUnreachable,
        grpc.StatusCode.NOT_FOUND: HasNone,
        grpc.StatusCode.RESOURCE_EXHAUSTED: NoRoom,
    }
    reason = next((str(value) for key, value in error.trailing_metadata() or () if key == "zerowake-reason"), "")
    kind = Wanted if reason == "wanted" else kinds.get(error.code(), AgentError)
    said = kind(error.details() or error.code().name)
    said.reason = reason
    return said
