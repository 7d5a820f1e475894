"""The executor: carries a plan's actions out, and knows what of them is under way.

An action is a task here from the moment it is decided until it has ended, well or not: the next world names it as under way, so that it is
not decided twice. What an agent refuses is put off, each time for longer; one that does not answer has refused nothing, and its stream says
when it is back. Rejected: tasks that are owned by whoever decided, which made three places count what starts.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Protocol
from weakref import WeakKeyDictionary

from prometheus_client import Counter

from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.agent import AgentError, AgentSilent, AgentUnreachable, NoRoom, Wanted
from scaler.fleet.nodes import Nodes
from scaler.fleet.snapshot_peers import peers_of
from scaler.plan.actions import Action, Drop, End, Keep, Pin, Sleep, Stage, Start
from scaler.plan.estimate import total_bytes
from scaler.plan.policy import Plan
from scaler.plan.rungs import Rung
from zerowake_shared.background import ended
from zerowake_shared.backoff import Backoff
from zerowake_shared.clock import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_STAGINGS = Counter(
    "zerowake_plan_stagings_total", "Snapshots that agents were asked to take up to a rung, by what became of it.", ["rung", "result"]
)
_FIRST_START_RETRY_SECONDS, _LAST_START_RETRY_SECONDS = 0.2, 30.0
_FIRST_STAGE_RETRY_SECONDS, _LAST_STAGE_RETRY_SECONDS = 30.0, 1800.0
_UNSTAGE_SECONDS = 30.0
_STANDS = {Rung.DISK: "on disk", Rung.MEMORY: "in memory", Rung.STANDBY: "as a standby", Rung.PARKED: "parked"}


class ReplicaMaker(Protocol):
    """Who makes and ends replicas where Kubernetes does not."""

    async def start(self, action: Start) -> Callable[[], None] | None:
        """Returns when the replica is ready: what makes it known, to be called once the start is under way no more; None: it is known.

        Raises AgentError.
        """

    async def end(self, action: End) -> None:
        """Returns when the replica has ended. Cancelled while it finishes its requests: it is wanted again."""


class Executor:
    """Carries out stages, drops, pins, starts, ends and sleeps. `close` cancels what is under way.

    failed: is told why a start failed; broken: the same, where it was no matter of room or of an agent. after: is told of a model when an
    action of it has ended.
    """

    def __init__(
        self,
        nodes: Nodes,
        maker: ReplicaMaker | None = None,
        failed: Callable[[str, str], None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        broken: Callable[[str, str], None] | None = None,
    ) -> None:
        self._nodes = nodes
        self._clock = clock
        self._maker = maker
        self._failed = failed or (lambda model, why: None)
        self._broken = broken or (lambda model, why: None)
        self._after: Callable[[str], None] = lambda model: None
        self._refused: Callable[[Stage, str, str], None] = lambda stage, node, why: None
        self._complained: Callable[[Stage, str, str], None] = lambda stage, node, why: None
        self._wanted: Callable[[SnapshotName], bool] = lambda snapshot: True
        self._tasks: dict[Action, asyncio.Task[None]] = {}
        self._begun: WeakKeyDictionary[asyncio.Task[None], float] = WeakKeyDictionary()
        self._starts: dict[str, tuple[Backoff, float]] = {}  # by model: since its last start failed, and when the next may begin
        self._stages: dict[tuple[str, str, Rung], tuple[Backoff, float]] = {}
        self._pins: dict[tuple[str, str, Rung], tuple[Backoff, float]] = {}
        self._sleeps: dict[tuple[str, str, Rung], tuple[Backoff, float]] = {}  # of replicas in pods, by id
        self._refusals: dict[tuple[str, str, Rung], str] = {}  # why an agent did not take a snapshot to the rung when it was asked last

    def on_end(self, callback: Callable[[str], None]) -> None:
        self._after = callback

    def wanted_by(self, wanted: Callable[[SnapshotName], bool]) -> None:
        """`wanted`: whether a model still has the snapshot. One that has come to a node when none has is taken off it again."""
        self._wanted = wanted

    def on_refused(self, refused: Callable[[Stage, str, str], None], complained: Callable[[Stage, str, str], None]) -> None:
        """`refused(stage, node, why)`: the agent of the node of that name did not do it, or fell silent over it. `complained(…)`:
        it did it, and a source that it asked before it came to another did wrong."""
        self._refused, self._complained = refused, complained

    @property
    def under_way(self) -> tuple[Action, ...]:
        return tuple(self._tasks)

    def stagings(self) -> list[float]:
        """For how many seconds each snapshot that goes up to a rung has been under way."""
        now = self._clock.now()
        return [now - self._begun[task] for action, task in self._tasks.items() if isinstance(action, Stage)]

    @property
    def put_off(self) -> dict[tuple[str, str, Rung], float]:
        """(node's address, digest or replica's id, rung) → the moment at which it may be asked for again."""
        return {key: until for key, (_, until) in (*self._stages.items(), *self._sleeps.items())}

    @property
    def pins_put_off(self) -> dict[tuple[str, str, Rung], float]:
        """(node's address, digest, rung) → the moment at which that pin may be asked for again."""
        return {key: until for key, (_, until) in self._pins.items()}

    @property
    def refusals(self) -> Mapping[tuple[str, str, Rung], str]:
        """(node's address, digest, rung) → why its agent did not take the snapshot there when it was asked last."""
        return self._refusals

    def refusal(self, node: str, digest: str, rung: Rung) -> str:
        """Why the node's agent did not take the snapshot to that rung when it was asked last; empty: it did, or was not asked."""
        return self._refusals.get((node, digest, rung), "")

    def taken_down(self, node: str, digest: str, rung: Rung) -> None:
        """The agent took the snapshot down from that rung for somebody who wanted the room: it is left in peace as after a refusal."""
        self._stages[node, digest, rung] = self._later(None, _FIRST_STAGE_RETRY_SECONDS, _LAST_STAGE_RETRY_SECONDS)

    def not_before(self, model: str) -> float:
        """The moment at which the model's next start may begin, after one that failed."""
        return self._starts[model][1] if model in self._starts else -math.inf

    def carry_out(self, plan: Plan) -> None:
        """Begins what the plan asks for. Nothing is waited for."""
        for action in plan.actions:
            if isinstance(action, Stage):
                self._begin(action, self._stage(action), f"{action.rung.name.lower()} of {action.model}")
            elif isinstance(action, Drop):
                self._give_up([other for other in self._tasks if isinstance(other, Stage) and _undoes(action, other)])
                if action.rung is Rung.DISK and action not in self._tasks:
                    self._begin(action, self._drop(action), f"drop of {action.model}")
            elif isinstance(action, End) and not action.replica:
                same = (action.model, action.number)
                self._give_up([other for other in self._tasks if isinstance(other, Start) and (other.model, other.number) == same])
            elif isinstance(action, Keep):
                self._give_up([other for other in self._tasks if isinstance(other, End) and other.replica == action.replica])
            elif isinstance(action, Pin) and action not in self._tasks:  # of two models with one snapshot both ask
                self._begin(action, self._pin(action), f"pin of {action.model}")
            elif isinstance(action, Sleep):
                self._begin(action, self._sleep(action), f"{action.rung.name.lower()} of {action.replica}")
            elif self._maker is not None and isinstance(action, Start):
                self._begin(action, self._start(self._maker, action), f"starting {action.model}")
            elif self._maker is not None and isinstance(action, End):
                self._begin(action, self._maker.end(action), f"ending {action.replica}")

    async def close(self) -> None:
        """Returns when nothing is under way any more."""
        self._after = lambda model: None
        await ended(self._tasks.values())

    def _begin(self, action: Action, work: Coroutine[object, object, None], name: str) -> None:
        task = self._tasks[action] = asyncio.create_task(work, name=name)
        self._begun[task] = self._clock.now()
        task.add_done_callback(functools.partial(self._ended, action))

    def _ended(self, action: Action, task: asyncio.Task[None]) -> None:
        if self._tasks.get(action) is task:
            del self._tasks[action]
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed", task.get_name(), exc_info=error)
            self._put_off(action)
        self._after(action.model)

    def _give_up(self, actions: Iterable[Action]) -> None:
        """They count as under way no more: the next decision is made without them."""
        for action in actions:
            self._tasks.pop(action).cancel()

    async def _stage(self, action: Stage) -> None:
        agent = self._nodes.agent(action.node)
        if agent is None:
            return
        leaving = [task for each, task in self._tasks.items() if isinstance(each, Drop) and each.node == action.node]
        if leaving and not action.urgent:  # for which the agent makes room by itself
            await asyncio.wait(leaving)
        try:
            peers = peers_of(action, self._nodes, self.under_way)
            stores = (action.store,) if action.store else ()
            began = self._clock.now()
            complained = functools.partial(self._complained, action, agent.name)
            seconds = await agent.stage(action.snapshot, action.digest, action.rung, peers, stores, complained, urgent=action.urgent)
            if action.rung is Rung.DISK:
                seconds = self._clock.now() - began  # the agent's are those of the way up from there
                if not self._wanted(action.snapshot):
                    log.info("%s has come to %s, and nobody has it any more: it is removed", action.snapshot, agent.name)
                    await agent.unstage(action.snapshot, action.digest, seconds=_UNSTAGE_SECONDS)
                    return
                if residency := agent.residencies.get(action.snapshot):
                    agent.note_fetch(total_bytes(residency), seconds)
        except AgentError as error:
            _STAGINGS.labels(action.rung.name.lower(), "failed").inc()
            if not isinstance(error, AgentUnreachable):
                self._put_off(action)
                self._refusals[action.node, action.digest, action.rung] = str(error)
            if isinstance(error, AgentSilent) or not isinstance(error, AgentUnreachable):
                self._refused(action, agent.name, str(error))
            log.warning("%s could not be staged on %s: %s", action.model, agent.name, error)
            return
        _STAGINGS.labels(action.rung.name.lower(), "done").inc()
        self._stages.pop((action.node, action.digest, action.rung), None)
        self._refusals.pop((action.node, action.digest, action.rung), None)
        log.info("%s stands %s on %s after %.2f s: %s", action.model, _STANDS[action.rung], agent.name, seconds, action.reason)

    async def _drop(self, action: Drop) -> None:
        agent = self._nodes.agent(action.node)
        if agent is None:
            return
        try:
            await agent.unstage(action.snapshot, action.digest, seconds=_UNSTAGE_SECONDS, rung=action.rung, weights=action.weights)
        except AgentError as error:
            log.warning("%s could not be taken out of the memory of %s: %s", action.model, agent.name, error)
            return
        log.info("%s stands %s on %s, and no higher: %s", action.model, _STANDS[action.rung], agent.name, action.reason)

    async def _pin(self, action: Pin) -> None:
        agent = self._nodes.agent(action.node)
        if agent is None:
            return
        pinned = "pinned" if action.rung > Rung.ABSENT else "not pinned any more"
        try:
            await agent.pin(action.snapshot, action.digest, action.rung)
        except AgentError as error:
            if not isinstance(error, AgentUnreachable):
                self._put_off(action)
            log.warning("%s could not be %s on %s: %s", action.model, pinned, agent.name, error)
            return
        self._pins.pop((action.node, action.digest, action.rung), None)
        log.info("%s is %s%s on %s", action.model, pinned, f" {_STANDS[action.rung]}" if action.rung > Rung.ABSENT else "", agent.name)

    async def _sleep(self, action: Sleep) -> None:
        """What its agent refuses the agent says, too, where the pod's owner looks."""
        agent = self._nodes.agent(action.node)
        if agent is None:
            return
        try:
            await agent.sleep(action.replica, action.rung)
        except AgentError as error:
            if not isinstance(error, AgentUnreachable | Wanted):  # one that is wanted is not idle any more
                self._put_off(action)
            log.info("replica %s of %s stays awake: %s", action.replica, action.model, error)
            return
        self._sleeps.pop((action.node, action.replica, action.rung), None)
        log.info("replica %s of %s sleeps %s: %s", action.replica, action.model, _STANDS[action.rung], action.reason)

    async def _start(self, maker: ReplicaMaker, action: Start) -> None:
        try:
            make_known = await maker.start(action)
        except AgentError as error:
            self._failed(action.model, str(error))
            if not isinstance(error, AgentUnreachable | NoRoom):
                self._broken(action.model, str(error))
            pause = self._put_off(action)
            log.warning("no replica of %s could be started: %s; next try in %.1f s", action.model, error, pause)
        else:
            self._starts.pop(action.model, None)
            # A replica that is known while its start is under way would be counted twice, and another start given up for it.
            self._tasks.pop(action, None)
            if make_known is not None:
                make_known()

    def _put_off(self, action: Action) -> float:
        """Whatever made it fail: it is not begun again at once. Returns the seconds until it may be."""
        if isinstance(action, Start):
            starts = self._starts[action.model] = self._later(
                self._starts.get(action.model), _FIRST_START_RETRY_SECONDS, _LAST_START_RETRY_SECONDS
            )
            return starts[1] - self._clock.now()
        if isinstance(action, Stage):
            key = (action.node, action.digest, action.rung)
            stages = self._stages[key] = self._later(self._stages.get(key), _FIRST_STAGE_RETRY_SECONDS, _LAST_STAGE_RETRY_SECONDS)
            return stages[1] - self._clock.now()
        if isinstance(action, Pin):
            of = (action.node, action.digest, action.rung)
            pins = self._pins[of] = self._later(self._pins.get(of), _FIRST_STAGE_RETRY_SECONDS, _LAST_STAGE_RETRY_SECONDS)
            return pins[1] - self._clock.now()
        if isinstance(action, Sleep):
            there = {replica for node in self._nodes for replica in node.replicas}
            self._sleeps = {key: kept for key, kept in self._sleeps.items() if key[1] in there}
            of = (action.node, action.replica, action.rung)
            sleeps = self._sleeps[of] = self._later(self._sleeps.get(of), _FIRST_STAGE_RETRY_SECONDS, _LAST_STAGE_RETRY_SECONDS)
            return sleeps[1] - self._clock.now()
        return 0.0

    def _later(self, before: tuple[Backoff, float] | None, first: float, last: float) -> tuple[Backoff, float]:
        """After one more failure: the moment at which the next try may begin, with what counts the failures."""
        backoff = before[0] if before else Backoff(first, last)
        return backoff, self._clock.now() + backoff.next()


def _undoes(drop: Drop, stage: Stage) -> bool:
    return (drop.node, drop.snapshot, drop.digest) == (stage.node, stage.snapshot, stage.digest) and stage.rung > drop.rung
