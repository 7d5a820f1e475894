"""The models that are declared, by name and by snapshot.

It is kept in place by whoever reads what owners wish. What is asked for at each decision (which models have a snapshot, how high it is
pinned) is looked up, so that a request for one of 10,000 models costs nothing that grows with the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping

from scaler.books.snapshot_name import SnapshotName
from scaler.plan.rungs import Rung
from scaler.plan.world import Model


class DeclaredModels(MutableMapping[str, Model]):
    """By name, in the order in which they were declared first."""

    def __init__(self, models: Mapping[str, Model] | None = None) -> None:
        self._models: dict[str, Model] = {}
        self._sharing: dict[SnapshotName, dict[str, Model]] = {}
        self._places: dict[str, int] = {}
        self._next_place = itertools.count()
        self._made_here: dict[str, None] = {}
        self._spread: dict[str, None] = {}
        self._new: dict[str, None] = {}
        self.update(models or {})

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def __setitem__(self, name: str, model: Model) -> None:
        if name in self._models:
            self._unlist(name)
        else:
            self._places[name] = next(self._next_place)
        self._models[name] = model
        if model.snapshot is not None:
            self._sharing.setdefault(model.snapshot, {})[name] = model
        if model.replicas is not None:
            self._made_here[name] = None
        if model.copies > 1 or model.stored is not None:
            self._spread[name] = None
        self.changed(name)

    def __delitem__(self, name: str) -> None:
        self._unlist(name)
        del self._models[name], self._places[name]

    def _unlist(self, name: str) -> None:
        snapshot = self._models[name].snapshot
        if snapshot is not None:
            del self._sharing[snapshot][name]
            if not self._sharing[snapshot]:
                del self._sharing[snapshot]
        for names in (self._made_here, self._spread, self._new):
            names.pop(name, None)

    def of(self, snapshot: SnapshotName) -> Iterable[str]:
        """Names of those that have the snapshot."""
        return self._sharing.get(snapshot, {}).keys()

    def pin(self, snapshot: SnapshotName | None) -> Rung:
        """The highest that anybody wishes: several models may have the same snapshot."""
        sharing = self._sharing.get(snapshot, {}) if snapshot is not None else {}
        return max((model.pin for model in sharing.values()), default=Rung.ABSENT)

    @property
    def made_here(self) -> Iterable[str]:
        """Names of those whose replicas are ours to make."""
        return self._made_here.keys()

    def is_spread(self, name: str) -> bool:
        """Whether a node that has nothing of the model may be the one for a copy: several are wanted, or a store has it."""
        return name in self._spread

    def changed(self, name: str) -> None:
        """What is planned of the model by may be otherwise now."""
        if name in self._spread:
            self._new[name] = None

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Those that are declared, each once, in the order in which they were."""
        return sorted({name for name in names if name in self._places}, key=self._places.__getitem__)

    def take_new(self) -> list[str]:
        """Names of those that are spread, and were declared, or declared otherwise, since this was asked last."""
        new, self._new = list(self._new), {}
        return new
