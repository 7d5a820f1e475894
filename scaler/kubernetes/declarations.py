"""Which models there are on a cluster, as ModelSnapshots and ScaledObjects declare them, and what follows from it for the other parts.

A model's name stands for one thing in all requests, but objects of any namespace can name it. The namespace of the oldest object that does
has the name: limits, snapshot and triggers of the others' count for nothing, and pods of theirs are sent no requests, or whoever may
create a pod somewhere could answer for everybody else's model. A model of which only a ScaledObject is known is held for as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from scaler.books.ledger import Ledger
from scaler.books.limits import ModelLimits
from scaler.books.model_name import flaw
from scaler.books.snapshot_name import SnapshotName
from scaler.books.trigger import Trigger
from scaler.kubernetes.node_standing import demands_of
from scaler.kubernetes.resources import ModelSnapshot
from scaler.kubernetes.scaled_object import ScaledObject
from scaler.plan.declared import DeclaredModels
from scaler.plan.rungs import Rung
from scaler.plan.world import Model, Stored

log = logging.getLogger(__name__)

Declaration = ModelSnapshot | ScaledObject
_IDLE = {"drop": None, "standby": Rung.STANDBY, "parked": Rung.PARKED}
_Key = tuple[str, str, str]  # kind, namespace, name


@dataclass(frozen=True, slots=True)
class Taken:
    """An object that names a model of another namespace, its owner."""

    declaration: Declaration
    model: str
    owner: str

    @property
    def why(self) -> str:
        return f"names the model {self.model}, which is namespace {self.owner}'s already: it does not count; give the model another name"


class Snapshots(Protocol):
    def on_change(self, callback: Callable[[ModelSnapshot | None, ModelSnapshot | None], None]) -> None: ...


class Objects(Protocol):
    def on_change(self, callback: Callable[[ScaledObject | None, ScaledObject | None], None]) -> None: ...


class Models:
    """Keeps the ledger's models as the two informers have them. `planned`: what the planner plans by, kept up to date in place."""

    def __init__(self, ledger: Ledger) -> None:
        self.planned = DeclaredModels()
        self._ledger = ledger
        self._declared: dict[str, dict[_Key, Declaration]] = {}
        self._owners: dict[str, str] = {}
        self._limits: dict[str, tuple[ModelLimits, tuple[str, ...]]] = {}  # with the other names
        self._trigger_listeners: list[Callable[[Trigger], None]] = []
        self._owner_listeners: list[Callable[[str], None]] = []
        self._keep_listeners: list[Callable[[SnapshotName], None]] = []
        self._sources: dict[str, ModelSnapshot] = {}  # of each model that has some, as it declared them
        self._sources_listeners: list[Callable[[str], None]] = []
        self._foreign: dict[_Key, Taken] = {}
        self._foreign_listeners: list[Callable[[Declaration], None]] = []

    def follow(self, snapshots: Snapshots, objects: Objects) -> None:
        snapshots.on_change(self._changed)
        objects.on_change(self._changed)

    def on_trigger(self, callback: Callable[[Trigger], None]) -> None:
        """Calls `callback(trigger)` for each trigger of a model's own namespace, and again when it has changed."""
        self._trigger_listeners.append(callback)

    def on_owner(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)` after the model has passed to another namespace, or to none."""
        self._owner_listeners.append(callback)

    def on_keep(self, callback: Callable[[SnapshotName], None]) -> None:
        """Calls `callback(snapshot)` after a model wishes it to be kept otherwise: pinned, or as more or other copies. No node need
        have said anything since."""
        self._keep_listeners.append(callback)

    def on_sources(self, callback: Callable[[str], None]) -> None:
        """Calls `callback(model)` after the sources of its demand have changed, or whose they are."""
        self._sources_listeners.append(callback)

    def with_sources(self, model: str) -> ModelSnapshot | None:
        """The one whose `spec.sources` count for the model, as it declared them; None: it has none."""
        return self._sources.get(model)

    def on_taken(self, callback: Callable[[Declaration], None]) -> None:
        """Calls `callback(object)` after it came to name another namespace's model, or no longer does."""
        self._foreign_listeners.append(callback)

    @property
    def taken(self) -> Collection[Taken]:
        """The objects that name another namespace's model."""
        return self._foreign.values()

    def taken_by(self, declaration: Declaration) -> Taken | None:
        """Whose model it names, if that is another namespace's."""
        return self._foreign.get(_key(declaration))

    def owner(self, model: str) -> str:
        """The namespace whose pods may serve the model; empty: nobody has declared it."""
        return self._owners.get(model, "")

    def objects(self, model: str) -> Sequence[ScaledObject]:
        """The ScaledObjects that scale the model."""
        return [each for each in self._own(model) if isinstance(each, ScaledObject)]

    def without_snapshot(self) -> list[tuple[ScaledObject, str]]:
        """The ScaledObjects that count and whose model no ModelSnapshot of their namespace is of, with that model."""
        return [
            (each, model)
            for model in self._owners
            if not any(isinstance(other, ModelSnapshot) for other in self._own(model))
            for each in self.objects(model)
        ]

    def snapshots_of(self, namespace: str) -> set[str]:
        """The models that ModelSnapshots of the namespace are of."""
        return {
            model
            for model, declared in self._declared.items()
            if any(isinstance(each, ModelSnapshot) and each.metadata.namespace == namespace for each in declared.values())
        }

    def _own(self, model: str) -> list[Declaration]:
        """The declarations that count, the oldest first."""
        owner = self.owner(model)
        return [each for each in _by_age(self._declared.get(model, {}).values()) if each.metadata.namespace == owner]

    def _changed(self, old: Declaration | None, new: Declaration | None) -> None:
        touched: dict[str, None] = {}
        if old is not None and (model := _model(old)):
            if new is None or _model(new) != model:
                self._foreign.pop(_key(old), None)
            del self._declared[model][_key(old)]
            touched[model] = None
        if new is not None and (model := _model(new)):
            self._declared.setdefault(model, {})[_key(new)] = new
            touched[model] = None
        for model in touched:
            self._settle(model)
        if isinstance(new, ScaledObject) and (trigger := new.trigger) and new.metadata.namespace == self.owner(trigger.model):
            for callback in self._trigger_listeners:
                callback(trigger)

    def _settle(self, model: str) -> None:
        declared = _by_age(self._declared[model].values())
        if not declared:
            del self._declared[model]
        owner = declared[0].metadata.namespace if declared else ""
        passed = owner != self.owner(model)
        if owner:
            self._owners[model] = owner
        else:
            self._owners.pop(model, None)
        own = self._own(model)
        for each in declared:
            self._note_owner(each, model, owner)
        snapshot = next((each for each in own if isinstance(each, ModelSnapshot)), None)
        if owner:
            self._declare(model, snapshot)
        elif self._limits.pop(model, None):
            self._ledger.withdraw(model)
        before = _kept(self.planned.get(model))
        if snapshot is not None and not snapshot.metadata.deletion_timestamp:
            self.planned[model] = planned(snapshot)
        else:
            self.planned.pop(model, None)
        for name in {each[0] for each in before ^ _kept(self.planned.get(model))}:
            for kept in self._keep_listeners:
                kept(name)
        self._note_sources(model, snapshot)
        if passed:
            for callback in self._owner_listeners:
                callback(model)

    def _declare(self, model: str, snapshot: ModelSnapshot | None) -> None:
        limits = snapshot.limits if snapshot else ModelLimits()
        names = tuple(name for name in snapshot.spec.names if not flaw(name)) if snapshot else ()
        if self._limits.get(model) == (limits, names):
            return
        self._limits[model] = limits, names
        self._ledger.declare(model, limits, names)
        for name in names:
            if (other := self._ledger.named(name)) != model:
                log.warning("%s is to be called %s as well, which is %s already: requests for that go there", model, name, other)

    def _note_sources(self, model: str, snapshot: ModelSnapshot | None) -> None:
        before, now = self._sources.get(model), snapshot if snapshot and snapshot.spec.sources else None
        if (before and (before.key, before.spec.sources)) == (now and (now.key, now.spec.sources)):
            return
        if now:
            self._sources[model] = now
        else:
            del self._sources[model]
        for callback in self._sources_listeners:
            callback(model)

    def _note_owner(self, declaration: Declaration, model: str, owner: str) -> None:
        key, before = _key(declaration), self._foreign.pop(_key(declaration), None)
        if declaration.metadata.namespace != owner:
            now = self._foreign[key] = Taken(declaration, model, owner)
            if before is not None and (before.model, before.owner) == (model, owner):
                return
            log.warning("%s %s/%s %s", *key, now.why)
        elif before is None:
            return
        for callback in self._foreign_listeners:
            callback(declaration)


def planned(snapshot: ModelSnapshot) -> Model:
    """What the plan is told of a ModelSnapshot. It waits in memory at most: what stands higher is a process, which no pod can take over."""
    return Model(
        snapshot.model,
        snapshot=SnapshotName(snapshot.metadata.namespace, snapshot.artifact_name),
        stage=min(Rung[snapshot.spec.stage.upper()], Rung.MEMORY),
        idle=_IDLE[snapshot.spec.idle],
        idle_seconds=snapshot.spec.idle_seconds,
        digest=snapshot.ready_digest,
        stored=_stored(snapshot),
        copies=snapshot.spec.copies,
        pin=Rung[snapshot.spec.pin.upper()],
        pods=demands_of(snapshot.spec.template.get("spec") or {}) if snapshot.spec.template else None,
    )


def _kept(model: Model | None) -> set[tuple[SnapshotName, Rung, int, str | None, Stored | None]]:
    """How it wishes its snapshot to be kept, and of several copies which one, and from where: one wish or none."""
    if model is None or model.snapshot is None or (model.pin is Rung.ABSENT and model.copies == 1):
        return set()
    copied = (model.copies, model.digest, model.stored) if model.copies > 1 else (1, None, None)
    return {(model.snapshot, model.pin, *copied)}


def _stored(snapshot: ModelSnapshot) -> Stored | None:
    status, store = snapshot.status, snapshot.stored
    if store is None:
        return None
    return Stored(store.name, store.digest, status.image_bytes, status.weights_bytes, status.gpu_bytes)


def in_memory_all_the_same(snapshot: ModelSnapshot) -> str:
    """What its owner is told, behind where it is, if he asks for a rung above memory; else empty."""
    if Rung[snapshot.spec.stage.upper()] <= Rung.MEMORY:
        return ""
    return (
        f"; spec.stage: {snapshot.spec.stage} counts as memory, since Kubernetes makes each pod anew, and no pod can take over a process "
        "that waits on its node"
    )


def _model(declaration: Declaration) -> str:
    if isinstance(declaration, ModelSnapshot):
        return "" if flaw(declaration.model) else declaration.model  # the API server refuses such a one
    trigger = declaration.trigger
    return trigger.model if trigger else ""


def _key(declaration: Declaration) -> _Key:
    return type(declaration).__name__, declaration.metadata.namespace, declaration.metadata.name


def _by_age(declarations: Iterable[Declaration]) -> list[Declaration]:
    return sorted(declarations, key=lambda each: (each.metadata.creation_timestamp, each.metadata.uid))
