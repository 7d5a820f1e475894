"""One node's agent: the calls by which it is asked to do something, beside what it has said of its node (heard.py).

Errors of gRPC end here: a call raises an AgentError that says in the agent's own words what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc
from zerowake_proto import agent_pb2, agent_pb2_grpc

from scaler.books.activation import Activation
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet import messages
from scaler.fleet.heard import Heard
from scaler.fleet.messages import Kept
from scaler.fleet.snapshot_peers import SnapshotPeer
from scaler.plan.rungs import Rung
from zerowake_shared.background import is_cancelled
from zerowake_shared.clock import SYSTEM_CHANCE, token

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


class Agent(Heard):
    """One agent. `stub` is its gRPC client."""

    def __init__(self, address: str, stub: agent_pb2_grpc.AgentAsyncStub, chance: random.Random = SYSTEM_CHANCE) -> None:
        super().__init__(address)
        self.stub = stub
        self._chance = chance

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
        with _agents_words():
            answer = await self._while_heard(self.stub.Stage(request))
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
        with _agents_words():
            return messages.kept(store, await self._while_heard(self.stub.Find(request)))

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
        with _agents_words():
            async for _ in self.stub.Snapshot(request):
                """Its progress the agent's own log has."""

    async def push(self, snapshot: SnapshotName, digest: str, store: str) -> float:
        """The snapshot into a store; returns the seconds that it took. Raises AgentError, whose reason says what the store did."""
        request = agent_pb2.PushRequest(request_id=self._id(), snapshot=messages.reference(snapshot, digest), store=store)
        updates = aiter(self.stub.Push(request))
        try:
            with _agents_words():
                while True:
                    async with asyncio.timeout(_SILENT_SECONDS):  # it says several times a second how far it is
                        update = await anext(updates)
                    if update.HasField("result"):
                        return update.result.seconds
        except (TimeoutError, StopAsyncIteration):
            raise AgentUnreachable("nothing is heard of its agent any more") from None

    async def pin(self, snapshot: SnapshotName, digest: str, rung: Rung) -> None:
        """No budget takes the snapshot from the rung any more, or from those below it; ABSENT: any may. Raises AgentError."""
        reference = messages.reference(snapshot, digest)
        request = agent_pb2.PinRequest(request_id=self._id(), snapshot=reference, rung=agent_pb2.Rung.Name(rung))
        with _agents_words():
            answer = await self._while_heard(self.stub.Pin(request))
        self.settle(snapshot, messages.residency(answer.residency), answer.residency.revision)

    async def unstage(
        self,
        snapshot: SnapshotName,
        digest: str,
        *,
        seconds: float,
        rung: Rung = Rung.ABSENT,
        orphan: bool = False,
        weights: bool = False,
    ) -> None:
        """The snapshot down to the rung, ABSENT: off the node, within so many seconds. `orphan`: only if a controller had it brought there,
        nobody has pinned it and nothing uses it. `weights`: those leave memory, too. Raises AgentError."""
        reference, to = messages.reference(snapshot, digest), agent_pb2.Rung.Name(rung)
        request = agent_pb2.UnstageRequest(request_id=self._id(), snapshot=reference, rung=to, orphan=orphan, weights=weights)
        with _agents_words():
            answer = await self.stub.Unstage(request, timeout=seconds)
        if rung > Rung.ABSENT:
            self.settle(snapshot, messages.residency(answer.residency), answer.residency.revision)

    async def restore(
        self, model: str, snapshot: SnapshotName | None, cold: Engine | None, activation: Activation | None
    ) -> agent_pb2.RestoreResponse:
        """One ready replica, for the activation that waits for it. Raises AgentError."""
        request = agent_pb2.RestoreRequest(request_id=self._id(), activation_id=activation.id if activation else "", model=model)
        if snapshot is not None:
            request.snapshot.CopyFrom(messages.reference(snapshot))
        if cold is not None:
            request.cold.CopyFrom(_told(cold))
        self._restoring[model] += 1
        try:
            with _agents_words():
                return await self.stub.Restore(request, metadata=_trace(activation))
        finally:
            self._restoring[model] -= 1
            if not self._restoring[model]:
                self._settle_early(model)

    async def release(self, replica_id: str) -> None:
        """The replica ends. Raises AgentError."""
        with _agents_words():
            await self.stub.Release(agent_pb2.ReleaseRequest(request_id=self._id(), replica_id=replica_id))

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

    async def wake(self, replica_id: str, activation: Activation | None) -> agent_pb2.Replica:
        """One that sleeps in its pod serves again. Raises AgentError: NoRoom, AgentUnreachable: it sleeps on; else it is gone."""
        request = agent_pb2.WakeRequest(request_id=self._id(), replica_id=replica_id, activation_id=activation.id if activation else "")
        with _agents_words():
            return (await self.stub.Wake(request, metadata=_trace(activation))).replica

    async def _demote(self, request: agent_pb2.DemoteRequest) -> None:
        request.request_id = self._id()
        with _agents_words():
            await self.stub.Demote(request)

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


def _trace(activation: Activation | None) -> list[tuple[str, str]] | None:
    """The metadata of a call for it: W3C's trace context, which names what the agent logs of it, too."""
    if activation is None or activation.trace is None:
        return None
    return [(name, value) for name, value in activation.trace._asdict().items() if value]


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


@contextlib.contextmanager
def _agents_words() -> Iterator[None]:
    """gRPC's errors become an AgentError. A call whose channel is closed ends as if its caller had been cancelled, who goes on, and has to
    hear of it like of any other end."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _said(error) from None
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        raise AgentUnreachable("the connection to its agent was given up meanwhile") from None


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
