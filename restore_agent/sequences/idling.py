"""Engines that sleep in their pods: nobody asks them, so they give their GPU memory back, and are woken in place by the next request.

    awake  →  (nothing new is sent to it)  →  no client is connected  →  quiesced: what was lent is let go of  →  stopped    parked
                                                                         the same, and suspended by CUDA       →  stopped    standby

On both rungs every process of it stands still, and a doorkeeper answers at its port (engine/doorkeeper.py): the kubelet's probes must not
find it dead, and who comes by another way than the gateway must find it. That is one rule for all engines. Rejected: leaving a parked
engine running, whose server may answer its probes while it is quiesced, or hold them, or fail; no engine was made for that question.

An engine has to take part in the control directory: any other would take the time that it slept for time in which it hung, and only a
restored one has no such jump (standby.py). It stays on the GPUs that its pod has. Where they have no memory free at its wake it sleeps on;
after any other failure its container ends, and begins anew as the kubelet has it.

A move is not broken off when the one who wanted it leaves. Whoever wants an engine awake that is still waiting for its last client gets it
at once. What an agent that is killed leaves asleep the next one takes over (`asleep`), by what was written down of it (sleep_notes.py);
one that ends in order wakes them (`wake_all`), since no engine may depend on an agent that may not come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from restore_agent.engine.doorkeeper import Doorkeeper
from restore_agent.engine.engine import Engine
from restore_agent.errors import FAILURES, AgentError, ErrorKind
from restore_agent.places.container import Container
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.parked_budget import ParkedBudget, ParkedFull
from restore_agent.sequences.phases import Phases
from restore_agent.sequences.replicas import Origin, Replica, Replicas, State
from restore_agent.sequences.sleep_notes import SleepNotes
from restore_agent.sequences.standby import Rung, Standby
from restore_agent.sequences.transitions import Transitions
from restore_agent.snapshots.catalog import Snapshot
from zerowake_shared.background import ended
from zerowake_shared.phases import Phase

_QUIET_SECONDS = 2.0  # for the gateways to close what they have open to it
_LOOK_SECONDS = 0.025
_QUIET_LOOKS = 2  # without a client, one after the other: a gateway may not have heard yet
_ROOM_SECONDS = 30.0  # for others to give way
_FAREWELL_SECONDS = 20.0  # for all that an agent wakes as it ends
_T = TypeVar("_T")
_LOG = logging.getLogger("zerowake.agent")


class CannotSleep(AgentError):
    """An engine cannot be woken in its place, so it goes on."""

    reason = "cannot-sleep"


class StillUsed(AgentError):
    """An engine has clients, or is wanted; it goes on."""

    kind = ErrorKind.PRECONDITION
    reason = "still-used"


class Wanted(StillUsed):
    """An engine that was to sleep is asked in this very moment; it goes on."""

    reason = "wanted"


class NoRoomToWake(AgentError):
    """Its GPUs have no memory free for it; it sleeps on."""

    kind = ErrorKind.EXHAUSTED
    reason = "no-gpu-memory"


@dataclass(frozen=True, slots=True)
class News:
    """What has become of an engine, for whoever looks after its pod. is_bad: it did not go as it should."""

    replica: Replica
    reason: str  # Slept, StaysAwake, Woken, WakeFailed
    text: str
    is_bad: bool = False


@dataclass(eq=False)
class _Sleeper:
    """A replica that sleeps, or is on its way there or back. standby, doorkeeper: None before it stands."""

    replica: Replica
    container: Container
    snapshot: Snapshot
    standby: Standby | None = None
    doorkeeper: Doorkeeper | None = None
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    since: float = field(default_factory=time.monotonic)

    @property
    def engine(self) -> Engine:
        return self.replica.engine


class Idling:
    """The engines of a node that sleep in their pods. Iterating gives the Standby of each."""

    def __init__(self, transitions: Transitions, replicas: Replicas, notes: SleepNotes) -> None:
        self._transitions = transitions
        self._replicas = replicas
        self.notes = notes  # of the engines that sleep, for the next agent
        self._sleepers: dict[str, _Sleeper] = {}
        self._listeners: list[Callable[[News], None]] = []
        self._refusals: dict[str, str] = {}  # why replicas stay awake, as it was told last
        self._moves: set[asyncio.Task[Any]] = set()

    @contextlib.contextmanager
    def heard_by(self, callback: Callable[[News], None]) -> Iterator[None]:
        """Within the block the callback is called with all that is to be told of replicas that sleep, wake, or cannot."""
        self._listeners.append(callback)
        try:
            yield
        finally:
            self._listeners.remove(callback)

    def __iter__(self) -> Iterator[Standby]:
        return iter([each.standby for each in self._sleepers.values() if each.standby])

    def __contains__(self, replica: Replica) -> bool:
        return replica.id in self._sleepers

    async def sleep(self, replica: Replica, rung: Rung, budget: ParkedBudget) -> None:
        """Returns when it sleeps; one that does already stays on its rung.

        Raises:
            CannotSleep, StillUsed, ParkedFull: it goes on.
            RestoreFailed: it did not stand still, and is gone.
        """
        if sleeper := self._sleepers.get(replica.id):
            async with sleeper.moving:
                if sleeper.standby:
                    return
            raise Wanted(f"replica {replica.id} has just been wanted")
        try:
            snapshot, container = self._check(replica)
            if rung is Rung.PARKED:
                budget.check_there(replica.engine.gpu_bytes)
            sleeper = self._sleepers[replica.id] = _Sleeper(replica, container, snapshot)
            await self._finished(self._fall_asleep(sleeper, rung, budget), f"{rung.value} of {replica.id}")
        except (CannotSleep, StillUsed, ParkedFull) as error:
            if not isinstance(error, Wanted) and self._refusals.get(replica.id) != str(error):
                self._refusals = {each.id: self._refusals[each.id] for each in self._replicas if each.id in self._refusals}
                self._refusals[replica.id] = str(error)
                self._tell(replica, "StaysAwake", f"it is idle, and keeps what it has: {error}", is_bad=True)
            raise

    async def wake(self, replica_id: str, phases: Phases) -> Replica:
        """Returns when it serves; one that is awake does.

        Raises:
            NoReplica.
            NoRoomToWake: it sleeps on.
            RestoreFailed: it is gone.
        """
        replica = self._replicas.get(replica_id)
        if sleeper := self._sleepers.get(replica_id):
            sleeper.wanted.set()
            await self._finished(self._wake(sleeper, phases), f"wake of {replica_id}")
        return replica

    async def unpark(self, standby: Standby) -> None:
        """Gives back what a parked one holds of its GPUs; it sleeps on as a standby. Raises RestoreFailed: it is gone."""
        if sleeper := next((each for each in self._sleepers.values() if each.standby is standby), None):
            await self._finished(self._unpark(sleeper, standby), f"standby of {sleeper.replica.id}")

    def asleep(self, replica_id: str) -> Rung | None:
        """The rung on which another agent has left it asleep. None: it is awake, or was on its way."""
        note = self.notes.read(replica_id)
        return note.stands if note else None

    def was_moving(self, replica_id: str) -> bool:
        """Whether an agent was killed as it put it to sleep or woke it."""
        note = self.notes.read(replica_id)
        return note is not None and note.stands is None

    def take_over(self, replica: Replica) -> None:
        """One that another agent has left asleep."""
        note, container, snapshot = self.notes.read(replica.id), replica.engine.place, replica.snapshot
        assert note and note.stands and isinstance(container, Container) and snapshot
        sleeper = self._sleepers[replica.id] = _Sleeper(replica, container, snapshot)
        undo = contextlib.AsyncExitStack()
        undo.push_async_callback(container.close)
        gpus = note.gpus or {}
        sleeper.standby = Standby(
            snapshot,
            replica.engine,
            _going_on(replica.engine),
            undo,
            note.gpu_pids,
            gpus,
            note.before,
            note.stands,
            processes=note.processes,
            places=note.places or {},
            wake_bytes=replica.engine.wake_bytes(),
        )
        self._stands(sleeper)

    def end(self, replica: Replica) -> None:
        """Its container was asked to end: nothing in it would hear that."""
        if sleeper := self._sleepers.get(replica.id):
            with contextlib.suppress(AgentError):  # it has ended
                sleeper.container.end()

    async def wake_all(self) -> None:
        """For an agent that ends: whatever cannot be woken soon sleeps on, for the next one."""
        waking = [asyncio.create_task(self.wake(each, Phases()), name=f"wake of {each}") for each in self._sleepers]
        if waking:
            await asyncio.wait(waking, timeout=_FAREWELL_SECONDS)
            for task in waking:
                if task.done() and (error := task.exception()):
                    _LOG.warning("%s, as the agent ends: %s", task.get_name(), error)
        await ended([*waking, *self._moves])
        await asyncio.gather(*(each.doorkeeper.close() for each in self._sleepers.values() if each.doorkeeper))

    def _check(self, replica: Replica) -> tuple[Snapshot, Container]:
        """Raises CannotSleep, StillUsed."""
        snapshot, place = replica.snapshot, replica.engine.place
        if replica.state is not State.READY:
            raise StillUsed(f"replica {replica.id} is {replica.state.value}")
        if snapshot is None or not isinstance(place, Container):
            raise CannotSleep(f"replica {replica.id} cannot sleep: it was started by its own command, and not restored")
        if not snapshot.manifest.quiesces:
            raise CannotSleep(
                f"an engine of snapshot {snapshot} cannot sleep: it does not take part in the control directory, so it cannot let go of "
                "what is lent to it, and would take the time that it sleeps for time in which it hung"
            )
        if place.unanswerable:
            raise CannotSleep(f"replica {replica.id} cannot sleep: {place.unanswerable}")
        return snapshot, place

    async def _fall_asleep(self, sleeper: _Sleeper, rung: Rung, budget: ParkedBudget) -> None:
        replica, engine = sleeper.replica, sleeper.engine
        async with sleeper.moving:
            self._replicas.sleeps(replica, rung)
            try:
                await self._quiet(sleeper)
                with budget.counted(engine.gpu_bytes if rung is Rung.PARKED else {}):
                    await asyncio.to_thread(self.notes.moves, replica.id, sleeper.container.pid)
                    sleeper.standby = await self._stopped(sleeper, rung)
                await asyncio.to_thread(self.notes.stands, replica.id, sleeper.container.pid, sleeper.standby)
            except StillUsed:
                self._forget(sleeper)
                self._replicas.wakes(replica)
                raise
            except BaseException as error:
                await self._lost(sleeper, str(error) or "it took too long")
                raise
            self._stands(sleeper)
        self._tell(replica, "Slept", f"{rung.value}, as nobody asks it; the next request wakes it")
        if engine.clients():  # one came in between, and its request stands still with the engine
            await self._wake(sleeper, Phases())
            raise Wanted(f"a client of replica {replica.id} came as it was put to sleep")

    async def _quiet(self, sleeper: _Sleeper) -> None:
        """Raises StillUsed."""
        deadline, looks = time.monotonic() + _QUIET_SECONDS, 0
        while looks < _QUIET_LOOKS:
            clients = sleeper.engine.clients()
            looks = 0 if clients else looks + 1
            if clients and time.monotonic() > deadline:
                many = "a client is" if clients == 1 else f"{clients} clients are"
                raise StillUsed(f"{many} connected to replica {sleeper.replica.id}, which the gateways send nothing")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await sleeper.wanted.wait()
                    raise Wanted(f"replica {sleeper.replica.id} is wanted")

    async def _stopped(self, sleeper: _Sleeper, rung: Rung) -> Standby:
        """Raises RestoreFailed."""
        standby = await self._transitions.demote(sleeper.engine, sleeper.snapshot, rung)
        if rung is Rung.PARKED:
            await asyncio.to_thread(sleeper.engine.stop)
        return standby

    async def _wake(self, sleeper: _Sleeper, phases: Phases) -> None:
        replica = sleeper.replica
        async with sleeper.moving:
            standby = sleeper.standby
            if standby is None or self._sleepers.get(replica.id) is not sleeper:
                return  # it was woken, or ended, meanwhile
            rung = standby.rung
            with contextlib.ExitStack() as until_begun:
                until_begun.callback(sleeper.wanted.clear)
                try:
                    async with asyncio.timeout(_ROOM_SECONDS) as patience, self._transitions.room_for(standby) as pairs:
                        patience.reschedule(None)
                        until_begun.pop_all()
                        await self._wake_on(sleeper, standby, pairs, phases)
                except RestoreFailed:
                    raise
                except (AgentError, TimeoutError) as error:  # of the room, before anything was begun
                    why = str(error) or "its GPU's memory did not come free in time"
                    self._tell(replica, "WakeFailed", f"it sleeps on: {why}", is_bad=True)
                    raise NoRoomToWake(f"replica {replica.id} sleeps on: {why}") from None
            self._forget(sleeper)
            replica.origin = Origin.PARKED if rung is Rung.PARKED else Origin.STANDBY
            replica.phases, replica.spans = phases.done(), phases.spans()
            self._replicas.wakes(replica)
        parts = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in replica.phases)
        slept = time.monotonic() - sleeper.since
        self._tell(replica, "Woken", f"in {phases.total:.3f} s, after {slept:.0f} s {_AS[rung]} ({parts})")

    async def _wake_on(self, sleeper: _Sleeper, standby: Standby, pairs: Any, phases: Phases) -> None:
        """Raises RestoreFailed: it is gone."""
        try:
            await asyncio.to_thread(self.notes.moves, sleeper.replica.id, sleeper.container.pid)
            if sleeper.doorkeeper:
                sleeper.doorkeeper.stop()
            if standby.rung is Rung.PARKED:
                with phases.phase(Phase.IMAGE_WAKE):
                    sleeper.engine.go_on()
            await self._transitions.wake_on(standby, pairs, phases)
        except BaseException as error:
            await self._lost(sleeper, str(error) or "it took too long")
            raise RestoreFailed("engine-failed", str(error)) if isinstance(error, OSError) else error from None

    async def _unpark(self, sleeper: _Sleeper, standby: Standby) -> None:
        replica = sleeper.replica
        async with sleeper.moving:
            if sleeper.standby is not standby or standby.rung is not Rung.PARKED or self._sleepers.get(replica.id) is not sleeper:
                return
            try:
                await asyncio.to_thread(self.notes.moves, replica.id, sleeper.container.pid)
                sleeper.engine.go_on()  # CUDA suspends nothing that stands still
                await self._transitions.unpark(standby)
                await asyncio.to_thread(self.notes.stands, replica.id, sleeper.container.pid, standby)
            except BaseException as error:
                await self._lost(sleeper, str(error) or "it took too long")
                raise
            self._replicas.sleeps(replica, Rung.STANDBY)
        self._tell(replica, "Slept", "a standby now, since others need its GPU's memory; the next request wakes it")

    def _stands(self, sleeper: _Sleeper) -> None:
        """It stands still from now on."""

        async def wanted() -> None:
            await self.wake(sleeper.replica.id, Phases())

        sleeper.since = time.monotonic()
        sleeper.doorkeeper = Doorkeeper(sleeper.engine, sleeper.container.probed, wanted)
        sleeper.container.exit_of(sleeper.engine.pid).add_done_callback(lambda _: self._forget(sleeper))

    def _forget(self, sleeper: _Sleeper) -> None:
        """It is awake, or has ended."""
        if sleeper.doorkeeper:
            sleeper.doorkeeper.stop()
        if self._sleepers.get(sleeper.replica.id) is sleeper:
            del self._sleepers[sleeper.replica.id]
            self.notes.forget(sleeper.replica.id)

    async def _lost(self, sleeper: _Sleeper, why: str) -> None:
        """Nobody knows what would go on there: its container ends, and begins anew."""
        self._forget(sleeper)
        self._tell(sleeper.replica, "WakeFailed", f"its container begins anew: {why}", is_bad=True)
        with contextlib.suppress(*FAILURES):  # it has ended
            await sleeper.container.close()

    def _tell(self, replica: Replica, reason: str, text: str, *, is_bad: bool = False) -> None:
        _LOG.log(logging.WARNING if is_bad else logging.INFO, "replica %s: %s: %s", replica.id, reason, text)
        for callback in self._listeners:
            callback(News(replica, reason, text, is_bad))

    async def _finished(self, work: Coroutine[Any, Any, _T], name: str) -> _T:
        """A half-made move is no state at all: it goes on when the one who wanted it leaves."""
        task = asyncio.create_task(work, name=name)
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            if not task.cancelled() and (error := task.exception()):
                _LOG.warning("%s failed, and nobody waited for it any more: %s", name, error)
            raise


_AS = {Rung.PARKED: "parked", Rung.STANDBY: "as a standby"}


def _going_on(engine: Engine) -> Callable[[], Coroutine[Any, Any, None]]:
    async def let_go() -> None:
        engine.go_on()

    return let_go
