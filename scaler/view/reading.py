"""Reads the state of the whole system (view/state.py) from the parts of a running scaler, on one machine and on Kubernetes alike.

Of a large fleet that takes some time, so it is done in pieces, between which requests go on: what is told of nodes is of the moment at
which the reading began (they are values), what is told of models and replicas of the moments at which it came to them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from importlib.metadata import version

from aiohttp import web

from scaler.books.activation import Activations
from scaler.books.ledger import Ledger
from scaler.books.snapshot_name import SnapshotName
from scaler.fleet.nodes import Nodes
from scaler.fleet.planner import Planner
from scaler.gateway.dispatcher import Dispatcher, Member
from scaler.plan import world
from scaler.plan.actions import Action, End, Keep, Prefer, Sleep
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.sources.watch import SourceState
from scaler.view.node_state import Copies, NodeStates
from scaler.view.request_rates import RequestRates
from scaler.view.state import Activation, Model, Plan, Replica, Replicas, ReplicaState, Source, State, Step, encoded
from scaler.view.waterfall import shown
from zerowake_shared.background import kept
from zerowake_shared.clock import Clock

log = logging.getLogger(__name__)

_SHOWN_ACTIVATIONS = 20
_AT_A_TIME_SECONDS = 0.005  # before requests have their turn
_AT_A_TIME = 32  # models, nodes, … that become JSON in one go
_REFUSED = "its agent could not do it"
Scale = Callable[[str], tuple[int | None, int | None]]


class Pace:
    """Lets others have the loop when it was held for a while."""

    def __init__(self) -> None:
        self._time = asyncio.get_running_loop().time
        self._began = self._time()

    async def __call__(self) -> None:
        if self._time() - self._began > _AT_A_TIME_SECONDS:
            await asyncio.sleep(0)
            self._began = self._time()


class StateReader:
    """Of one scaler. `run` counts what requests a second are made of.

    models: what their owners wish. next_likely: seconds until each model is likely to be asked for (forecast/forecast.py). missing: what
    the scaler has not heard yet; empty: nothing. scale: of a model, how many replicas are wanted, and how many there may be; None: not
    known here. owner: the namespace whose pods may serve a model; empty: none. leads: whether this scaler does what one alone does.
    sources: those of a model, as they are known (sources/watch.py).
    """

    def __init__(
        self,
        instance: str,
        *,
        ledger: Ledger,
        dispatcher: Dispatcher,
        nodes: Nodes,
        planner: Planner,
        models: DeclaredModels,
        next_likely: Callable[[], Mapping[str, float | None]],
        missing: Callable[[], str],
        scale: Scale,
        owner: Callable[[str], str] = lambda _: "",
        leads: bool = True,
        sources: Callable[[str], Sequence[SourceState]] = lambda _: (),
    ) -> None:
        self._instance = instance
        self._ledger = ledger
        self._activations: Activations = ledger.activations
        self._clock: Clock = ledger.activations.clock
        self._dispatcher = dispatcher
        self._nodes = nodes
        self._planner = planner
        self._models = models
        self._next_likely = next_likely
        self._missing = missing
        self._scale = scale
        self._owner = owner
        self._sources = sources
        self._rates = RequestRates(ledger, self._clock)
        self._node_states = NodeStates()
        self._version = version("zerowake")
        self.leads = leads

    def asked_by(self, sources: Callable[[str], Sequence[SourceState]]) -> None:
        """`sources` is known only now."""
        self._sources = sources

    async def while_leading(self, work: Coroutine[object, object, None]) -> None:
        """Does the work, and says that this scaler leads for as long."""
        self.leads = True
        try:
            await work
        finally:
            self.leads = False

    async def run(self) -> None:
        """Counts what rates of requests are made of, until it is cancelled."""
        await kept(self._rates.run, "rates of requests", log)

    @property
    def routes(self) -> list[web.RouteDef]:
        return [web.get("/state", self._show)]

    async def _show(self, _: web.Request) -> web.Response:
        pieces = [piece async for piece in _encoded(await self.read(), Pace())]
        return web.Response(body=b"".join(pieces), content_type="application/json")

    async def read(self) -> State:
        """As it is now. It takes less than a second with a thousand nodes, of which the loop is held for milliseconds at a time."""
        at, pace, there = self._clock.wall(), Pace(), self._planner.world(())
        copies = Copies(dict(self._planner.refusals))
        nodes = await self._node_states.of(there.nodes, copies, pace)
        copies.complete()
        members = list(self._dispatcher.members())
        running = {replica.id: (node.called, replica) for node in there.nodes for replica in node.replicas.values()}
        await pace()
        return State(
            at=at,
            version=self._version,
            instance=self._instance,
            leads=self.leads,
            missing=self._missing() or None,
            models=await self._all_models(copies, members, pace),
            nodes=nodes,
            replicas=tuple(self._replicas(members, running)),
            plan=self._plan(there, copies, running),
            activations=self._all_activations(),
        )

    # --- models

    async def _all_models(self, copies: Copies, members: Iterable[Member], pace: Pace) -> tuple[Model, ...]:
        of_model: dict[str, list[Member]] = {}
        for member in members:
            of_model.setdefault(member.backend.model, []).append(member)
        likely, found = self._next_likely(), []
        for name in sorted(self._ledger.models()):
            await pace()
            if self._ledger.knows(name):
                found.append(self._model(name, copies, of_model.get(name, ()), likely.get(name)))
        return tuple(found)

    def _model(self, name: str, copies: Copies, members: Sequence[Member], likely: float | None) -> Model:
        declared = self._models.get(name) or world.Model(name)
        demand, limits, there = self._ledger.demand_anywhere(name), self._ledger.limits(name), copies.of(declared.snapshot)
        states = [_state_of(member) for member in members]
        wanted, limit = self._scale(name)
        pin = self._models.pin(declared.snapshot)
        return Model(
            name=name,
            namespace=self._owner(name) or None,
            snapshot=str(declared.snapshot) if declared.snapshot else None,
            stage=declared.stage.name.lower(),
            rung=there.best.name.lower() if there.nodes else None,
            pinned=pin.name.lower() if pin > Rung.ABSENT else None,
            copies=there.nodes,
            copies_wanted=declared.copies,
            replicas=Replicas(
                ready=states.count(ReplicaState.READY),
                draining=states.count(ReplicaState.DRAINING),
                sleeping=states.count(ReplicaState.SLEEPING),
                wanted=wanted,
                limit=limit,
            ),
            held=demand.held,
            held_limit=limits.max_requests,
            held_bytes=self._ledger.held_bytes(name),
            in_flight=demand.in_flight,
            elsewhere=demand.elsewhere.pending,
            rate=self._rates.of(name),
            next_likely_seconds=0.0 if demand.pending else likely,
            seconds_to_serve=there.soonest,
            failure=self._ledger.failure(name) or None,
            refused="; ".join(there.refused) or None,
            unusable="; ".join(there.unusable) or None,
            sources=tuple(_source(each) for each in self._sources(name)),
        )

    # --- replicas

    def _replicas(self, members: Iterable[Member], running: Mapping[str, tuple[str, world.Replica]]) -> Iterable[Replica]:
        """Those that the gateway has, and those that only agents speak of."""
        counted = {member.backend.id: member for member in members}
        unserved = [(replica.model, replica.id) for name, (_, replica) in running.items() if name not in counted]
        for model, name in sorted([*((each.backend.model, each.backend.id) for each in counted.values()), *unserved]):
            member, (node, told) = counted.get(name), running.get(name, ("", None))
            yield Replica(
                id=name,
                model=model,
                node=node or (member.backend.node if member else "") or None,
                origin=(told.origin if told else "") or None,
                state=_state_of(member) if member else ReplicaState.UNSERVED,
                sleeps=told.sleeps.name.lower() if told and told.sleeps else None,
                in_flight=self._dispatcher.in_flight(name),
                detail=(told.detail if told else "") or None,
            )

    # --- plan

    def _plan(self, there: world.World, copies: Copies, running: Mapping[str, tuple[str, world.Replica]]) -> Plan:
        names = {node.address: node.called for node in there.nodes}
        put_off = []
        for what, moments in (("stage", there.put_off), ("pin", there.pins_put_off)):
            for (address, of, rung), until in moments.items():
                if until <= there.now:
                    continue
                snapshot, sleeper = copies.called(of), running.get(of)
                put_off.append(
                    Step(
                        do="sleep" if sleeper else what,
                        model=sleeper[1].model if sleeper else next(iter(self._models.of(snapshot)), None) if snapshot else None,
                        snapshot=str(snapshot) if snapshot else None,
                        node=names.get(address, address),
                        rung=rung.name.lower(),
                        replica=of if sleeper else None,
                        why=(self._planner.refusal(address, of, rung) if what == "stage" else "") or _REFUSED,
                        for_seconds=until - there.now,
                    )
                )
        put_off.sort(key=lambda each: (each.for_seconds or 0.0, each.snapshot or "", each.node or ""))
        return Plan(under_way=tuple(_step(action, names) for action in there.under_way), put_off=tuple(put_off))

    # --- activations

    def _all_activations(self) -> tuple[Activation, ...]:
        activations = [*self._activations.open(), *self._activations.recent(_SHOWN_ACTIVATIONS)]
        return tuple(map(shown, activations))


async def _encoded(state: State, pace: Pace) -> AsyncIterator[bytes]:
    """Its JSON in pieces, each of which holds the loop for a moment only."""
    before = b"{"
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        yield before + encoded(field.name) + b":"
        before = b","
        if isinstance(value, tuple):
            for begin in range(0, len(value), _AT_A_TIME):
                yield (b"," if begin else b"[") + encoded(value[begin : begin + _AT_A_TIME])[1:-1]
                await pace()
            yield b"]" if value else b"[]"
        else:
            yield encoded(value)
    yield b"}"


def _state_of(member: Member) -> ReplicaState:
    if member.asleep:
        return ReplicaState.SLEEPING
    if member.draining:
        return ReplicaState.DRAINING
    if member.unreachable:
        return ReplicaState.UNREACHABLE
    return ReplicaState.READY if member.probe is None else ReplicaState.SUSPECT


def _source(state: SourceState) -> Source:
    counts = state.reading
    return Source(
        name=state.name,
        of=state.says,
        pending=counts.pending if counts else None,
        replicas=counts.replicas if counts else None,
        age_seconds=state.age_seconds,
        up=state.up,
        fault=state.fault or None,
    )


def _step(action: Action, names: Mapping[str, str]) -> Step:
    node = "" if isinstance(action, Prefer) else action.node
    snapshot: SnapshotName | None = getattr(action, "snapshot", None)
    rung: Rung | None = getattr(action, "rung", None)
    return Step(
        do=type(action).__name__.lower(),
        model=action.model,
        snapshot=str(snapshot) if snapshot else None,
        node=names.get(node, node) or None,
        rung=rung.name.lower() if rung else None,
        replica=(action.replica if isinstance(action, End | Keep | Sleep) else "") or None,
        why=action.reason,
        for_seconds=None,
    )
