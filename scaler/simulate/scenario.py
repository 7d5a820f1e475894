"""The file that `zerowake simulate` reads: nodes, models, rates and a trace, checked whole before anything is run. scaler/README.md has
every key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from scaler.local.byte_sizes import Bytes, byte_size
from scaler.local.config import Section, read
from scaler.plan.worth import OBJECTIVES, Objective
from scaler.simulate import trace as traces
from scaler.simulate.rungs import Rungs


def _budget(value: object) -> object:
    """Of one node in bytes, or all nodes' as a share of all weights: below zero here."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return -float(value.strip()[:-1]) / 100
        except ValueError:
            raise ValueError(f"{value!r} is no share of all weights, such as 10%") from None
    found = byte_size(value)
    if found < 0:
        raise ValueError(f"{value!r} is less than nothing")
    return found


Budget = Annotated[float, BeforeValidator(_budget)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Nodes(Section):
    count: Count = 6
    gpus: Count = 8
    gpu_memory: Bytes = 141e9
    host_memory: Budget = -0.1  # for models that do not run: of one node, or as a share of all weights over all nodes
    free_gpu_memory: bool = True  # whether the weights of idle models stay on GPUs while nobody needs the room
    running: Bytes = 8e9  # what a running model takes of its GPU beside its weights
    disk_copies: Annotated[int, Field(ge=0)] | None = None  # nodes that have a model on disk; 0: a store alone has it; all unless given


class Sizes(Section):
    """A kind of models: its share of all, and its weights: one size, or [smallest, largest], evenly."""

    share: Share
    bytes: tuple[Bytes, Bytes]

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, value: object) -> object:
        if isinstance(value, dict) and "bytes" in value and not isinstance(value["bytes"], list):
            return {**value, "bytes": (value["bytes"], value["bytes"])}
        return value


class Models(Section):
    """Either a list with each model's bytes, or a count and a mix."""

    list: Mapping[str, Bytes] = Field(default_factory=dict)
    count: Count = 1000
    mix: tuple[Sizes, ...] = ()

    @model_validator(mode="after")
    def _one_of_both(self) -> Models:
        if bool(self.list) == bool(self.mix):
            raise ValueError("give list (NAME: BYTES), or mix (shares and bytes): one of both")
        if self.mix and not math.isclose(total := sum(each.share for each in self.mix), 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares of mix add up to {total:g}, not to 1")
        return self


class Measured(Section):
    """Bytes a second, and seconds, as tests/bench/results has them."""

    disk: Bytes = 5e9
    peer: Bytes = 10e9
    store: Bytes = 2e9
    pinned: Bytes = 55e9  # host memory to a GPU
    restore: Seconds = 0.36  # with nothing to be filled: what a standby takes
    fill: Seconds = 0.26  # the image's pages
    parked: Seconds = 0.04
    parked_bytes: Bytes = 1.6e9  # of a GPU


class ServeGen(Section):
    folder: Path
    windows: Share = 1.0
    requests: Share = 1.0
    most_a_second: Annotated[float, Field(gt=0)] = 10.0


class Daily(Section):
    days: Annotated[float, Field(gt=0)] = 14
    visits_a_day: Annotated[float, Field(gt=0)] = 20
    spread_seconds: Seconds = 1800
    noise: Annotated[float, Field(ge=0, le=1)] = 0.02


class TraceSection(Section):
    """One of three."""

    csv: Path | None = None
    servegen: ServeGen | None = None
    daily: Daily | None = None
    tokens: Annotated[float, Field(ge=0)] = 0.0  # of each request, where the trace does not say

    @model_validator(mode="after")
    def _exactly_one(self) -> TraceSection:
        if sum(each is not None for each in (self.csv, self.servegen, self.daily)) != 1:
            raise ValueError("give one of csv, servegen and daily")
        return self


class Goal(Section):
    """What a request's bytes in memory are good for (scaler/plan/worth.py): weights, or the name that a running scaler has for them."""

    hits: Annotated[float, Field(ge=0)] = 1.0
    mean: Annotated[float, Field(ge=0)] = 0.0
    tail: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in OBJECTIVES:
            raise ValueError(f"there is no objective {value!r}: there are {', '.join(OBJECTIVES)}, or weights of hits, mean and tail")
        return asdict(OBJECTIVES[value])

    @model_validator(mode="after")
    def _something(self) -> Goal:
        if not self.hits + self.mean + self.tail:
            raise ValueError("hits, mean and tail are all 0: one of them has to count")
        return self

    @property
    def objective(self) -> Objective:
        return Objective(self.hits, self.mean, self.tail)


class Scenario(Section):
    """The whole file."""

    seed: int = 1
    nodes: Nodes = Nodes()
    models: Models
    rates: Measured = Measured()
    parked: bool = False  # whether idle models on GPUs keep their process there
    cooldown_seconds: Annotated[float, Field(ge=0)] = 300.0
    request_seconds: Seconds = 3.0
    tokens_a_second: Annotated[float, Field(gt=0)] = 50.0
    objective: Goal = Goal()
    score: Literal["second half", "all"] = "second half"
    trace: TraceSection

    @model_validator(mode="after")
    def _fits(self) -> Scenario:
        largest = max([*self.models.list.values(), *(each.bytes[1] for each in self.models.mix)])
        parked = self.rates.parked_bytes if self.parked else 0.0
        if largest + max(self.nodes.running, parked) > self.nodes.gpu_memory:
            raise ValueError(
                f"a model of {largest / 1e9:g} GB and what it takes beside its weights fit on no GPU of {self.nodes.gpu_memory / 1e9:g} GB"
            )
        if self.nodes.disk_copies and self.nodes.disk_copies > self.nodes.count:
            raise ValueError(f"nodes.disk_copies is {self.nodes.disk_copies}, and there are {self.nodes.count} nodes")
        return self

    def read_trace(self) -> traces.Trace:
        """Raises: BadTrace."""
        rng = np.random.default_rng(self.seed)
        count = len(self.models.list) or self.models.count
        if self.trace.csv is not None:
            return traces.read_csv(self.trace.csv, self.models.list)
        if (given := self.trace.servegen) is not None:
            found = traces.read_servegen(given.folder, count, given.windows, given.requests, given.most_a_second, self.trace.tokens, rng)
        else:
            made = self.trace.daily or Daily()
            found = traces.daily(count, made.days, made.visits_a_day, made.spread_seconds, made.noise, self.trace.tokens, rng)
        return traces.Trace(list(self.models.list) or found.models, found.at, found.model, found.tokens, found.seconds)

    def sizes(self, models: list[str]) -> traces.Floats:
        """Bytes of each model's weights. Of a mix, which model is of which kind is drawn."""
        if self.models.list:
            return np.array([self.models.list[name] for name in models])
        rng = np.random.default_rng(self.seed + 1)
        order = rng.permutation(len(models))
        bounds = np.round(np.cumsum([0.0, *(each.share for each in self.models.mix)]) * len(models)).astype(int)
        sizes = np.empty(len(models))
        for kind, first, last in zip(self.models.mix, bounds[:-1], bounds[1:], strict=True):
            sizes[order[first:last]] = rng.uniform(*kind.bytes, last - first)
        return sizes

    @property
    def rungs(self) -> Rungs:
        rates = self.rates
        return Rungs(
            disk=rates.disk,
            peer=rates.peer,
            store=rates.store,
            pinned=rates.pinned,
            overhead=rates.restore,
            fill_seconds=rates.fill,
            parked_overhead=rates.parked,
            parked_bytes=rates.parked_bytes if self.parked else 0.0,
            stored_only=self.nodes.disk_copies == 0,
        )


def load(path: Path) -> Scenario:
    """Its relative paths count from its own folder. Raises: scaler.local.config.BadConfig."""
    found = read(path, Scenario)
    here, given = path.resolve().parent, found.trace
    update: dict[str, object] = {}
    if given.csv is not None:
        update["csv"] = here / given.csv.expanduser()
    if given.servegen is not None:
        update["servegen"] = given.servegen.model_copy(update={"folder": here / given.servegen.folder.expanduser()})
    return found.model_copy(update={"trace": given.model_copy(update=update)})
