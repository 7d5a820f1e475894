"""The replicas that live on this node, and what is known of each. A replica is its place: when the engine's root process ends, by itself
or by us, the place is closed and everything in it is gone."""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from restore_agent.engine.engine import Engine, EngineError
from restore_agent.errors import AgentError, ErrorKind
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.standby import Rung
from restore_agent.snapshots.catalog import Snapshot
from zerowake_shared.background import told

_HEALTH_PAUSE = 1.0  # seconds before a restored replica is asked for its health: its first request has come, and goes first
_LOOK_SECONDS = 1.0  # between two looks at one that is failing
_LOG = logging.getLogger("zerowake.agent")


class State(enum.Enum):
    """Whether a replica may be sent requests."""

    READY = "ready"
    RETIRING = "retiring"  # it finishes what it has
    FAILING = "failing"  # it is not healthy, and may finish what it has begun to answer
    IDLE = "idle"  # it sleeps in its pod, or is about to, and is to be woken first (idling.py)
    GONE = "gone"


class Origin(enum.Enum):
    """How a replica was made."""

    RESTORED = "restored"
    COLD = "cold"
    CAPTURED = "captured"
    STANDBY = "standby"
    PARKED = "parked"


class NoReplica(AgentError):
    """No replica of that id lives here."""

    kind = ErrorKind.NOT_FOUND
    reason = "no-replica"


@dataclass
class Replica:
    """An engine that serves, and what is known of it."""

    id: str
    model: str
    snapshot: Snapshot | None
    origin: Origin
    engine: Engine
    state: State = State.READY
    detail: str = ""  # why it ended, or why it was started cold
    phases: Sequence[tuple[str, float]] = ()  # of how it was made, in seconds
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # when these were, as in `Phases.spans`
    namespace: str = ""  # of its pod
    rung: Rung | None = None  # on which it sleeps, or will in a moment


class Replicas:
    """The replicas of a node, each watched until it ends."""

    def __init__(self, changed: Callable[[Replica], None], ended: Callable[[], Awaitable[None]]) -> None:
        """`changed` hears of each one that comes or goes, `ended` when all of one is gone."""
        self._changed = changed
        self._ended = ended
        self._live: dict[str, Replica] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def add(
        self,
        model: str,
        snapshot: Snapshot | None,
        origin: Origin,
        engine: Engine,
        phases: Phases,
        detail: str = "",
        namespace: str = "",
        replica_id: str = "",
        asleep: Rung | None = None,
    ) -> Replica:
        """Takes over the engine's place and output; the replica is ready from now on.

        replica_id: of an engine that may outlive this agent, so that the next one names it the same; empty: a new one.
        asleep: the rung on which it sleeps already.
        """
        name = replica_id or f"{model}-{secrets.token_hex(4)}"
        replica = Replica(name, model, snapshot, origin, engine, detail=detail, namespace=namespace)
        replica.phases, replica.spans = phases.done(), phases.spans()
        if asleep:
            replica.state, replica.rung = State.IDLE, asleep
        engine.output.name = replica.id
        self._live[replica.id] = replica
        self._watchers[replica.id] = asyncio.create_task(self._watch(replica), name=f"replica {replica.id}")
        told(self._watchers[replica.id], _LOG)
        self._changed(replica)
        return replica

    def get(self, replica_id: str) -> Replica:
        try:
            return self._live[replica_id]
        except KeyError:
            raise NoReplica(f"no replica {replica_id} on this node; it has ended or never was") from None

    async def release(self, replica_id: str) -> None:
        """Ends a replica; returns when all of it is gone. Raises NoReplica."""
        replica = self._ours(replica_id)
        replica.detail = "released"
        await self._end(replica)

    def retire(self, replica_id: str, why: str) -> None:
        """Nobody sends it anything new from now on; it ends by itself."""
        replica = self._live.get(replica_id)
        if replica and replica.state in (State.READY, State.FAILING, State.IDLE):
            self._becomes(replica, State.RETIRING, why)

    def sleeps(self, replica: Replica, rung: Rung) -> None:
        """Nobody sends it anything before it is woken."""
        if replica.state in (State.READY, State.IDLE):
            replica.rung = rung
            self._becomes(replica, State.IDLE, "")

    def wakes(self, replica: Replica) -> None:
        """It serves again, unless its pod has begun to go meanwhile."""
        replica.rung = None
        if replica.state is State.IDLE:
            self._becomes(replica, State.READY, "")

    def detach(self, replica_id: str) -> Replica:
        """Out of the list, its engine left running, to be a standby: for everybody else it has ended. Raises NoReplica."""
        replica = self._ours(replica_id)
        replica.state, replica.detail = State.GONE, "kept as a standby"
        self._live.pop(replica_id)
        self._watchers.pop(replica_id).cancel()
        self._changed(replica)
        return replica

    def _ours(self, replica_id: str) -> Replica:
        replica = self.get(replica_id)
        if not replica.engine.place.is_ours:
            raise NoReplica(f"replica {replica_id} is a pod, and Kubernetes' to end: scale its workload, or delete it")
        return replica

    async def close(self) -> None:
        """Ends every replica that is ours to end, all at once. Of the others nobody says that they have ended: they go on."""
        ours = [replica for replica in self if replica.engine.place.is_ours]
        for replica_id in {replica.id for replica in self} - {replica.id for replica in ours}:
            self._watchers.pop(replica_id).cancel()
            self._live.pop(replica_id)
        for replica in ours:
            replica.detail = "the agent stops"
        await asyncio.gather(*(self._end(replica) for replica in ours), return_exceptions=True)

    async def _watch(self, replica: Replica) -> None:
        # Not awaited itself: a cancelled watcher would cancel the news for everybody.
        ended = replica.engine.place.exit_of(replica.engine.pid)
        hangs = ""
        if replica.origin in (Origin.RESTORED, Origin.STANDBY, Origin.PARKED):
            # A restore does not wait for health. An engine that hangs as it wakes would hold its requests for ever.
            await asyncio.wait([ended], timeout=_HEALTH_PAUSE)
            hangs = await self._hangs(replica, ended)
        if not hangs:
            await asyncio.wait([ended])
        if replica.state in (State.READY, State.FAILING, State.IDLE):
            replica.detail = str(replica.engine.end_error()) if ended.done() else f"it was restored, and is ended: {hangs}"
            _LOG.warning("replica %s ended by itself: %s", replica.id, replica.detail)
            await self._end(replica)
        elif replica.state is State.RETIRING:
            await asyncio.wait([ended])
            await self._end(replica)

    async def _hangs(self, replica: Replica, ended: asyncio.Future[int]) -> str:
        """Returns when the engine is healthy, or has ended: empty. Else why not, when no client is connected to it any more: one that is
        busy with a long answer may have no thread for its health."""
        engine = replica.engine
        try:
            await engine.wait_healthy()
            return ""
        except EngineError as error:
            why = str(error)
        if ended.done() or replica.state is not State.READY:
            return ""
        _LOG.warning("replica %s is ended as soon as it answers nobody: %s", replica.id, why)
        self._becomes(replica, State.FAILING, why)
        while engine.clients():
            await asyncio.wait([ended], timeout=_LOOK_SECONDS)
            if ended.done():
                return ""
            if await engine.is_healthy():
                self._recovered(replica)
                return ""
        return why

    def _recovered(self, replica: Replica) -> None:
        """Unless its pod has begun to go meanwhile."""
        if replica.state is State.FAILING:
            self._becomes(replica, State.READY, "")

    def _becomes(self, replica: Replica, state: State, why: str) -> None:
        replica.state, replica.detail = state, why
        self._changed(replica)

    async def _end(self, replica: Replica) -> None:
        if replica.state is not State.GONE:
            replica.state = State.GONE
            self._changed(replica)
        try:
            await replica.engine.place.close()
            if written := replica.engine.place.written():
                _LOG.info(
                    "replica %s has ended, and with it what it wrote: %s; name the folders of such files in `shared:` to keep them",
                    replica.id,
                    written,
                )
        finally:
            replica.engine.output.close()
            self._live.pop(replica.id, None)
            self._watchers.pop(replica.id, None)
        await self._ended()
