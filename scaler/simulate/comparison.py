"""Policies over one scenario, and what came of each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from pydantic import ValidationError

from scaler.forecast.forecast import Forecast
from scaler.simulate import policies
from scaler.simulate.episodes import Episodes, episodes
from scaler.simulate.policies import Policy
from scaler.simulate.rungs import IN_MEMORY, NAMES
from scaler.simulate.scenario import Nodes, Scenario
from scaler.simulate.simulation import Cluster, Simulation
from scaler.simulate.trace import BadTrace, Floats, Trace

_SIMPLE: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (
        policies.Cold,
        policies.KeepAlive,
        policies.LruBlind,
        policies.Lru,
        policies.GreedyDual,
        policies.Histogram,
        policies.ServerlessLlm,
        policies.Belady,
    )
}
ALWAYS_ON = "always-on"
POLICIES = (ALWAYS_ON, *_SIMPLE, policies.Zerowake.name, policies.Clairvoyant.name)
_START = 1.8e9  # the trace's first moment, as wall-clock time


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one policy. scale_ups: how many were scored. Seconds to the first byte, beyond what the engine itself takes; shares from 0 to 1.
    gpu_hours: of all models' replicas. Bytes: over the whole trace; wasted: fetched ahead, never asked for. host_bytes: of all nodes.
    """

    policy: str
    host_bytes: float
    free_gpu_memory: bool
    scale_ups: int
    in_memory: float
    mean_seconds: float
    p50_seconds: float
    p99_seconds: float
    rungs: dict[str, float]
    gpu_hours: float
    gpu_hours_of_always_on: float
    loaded_bytes: float
    ahead_bytes: float
    copied_bytes: float
    wasted_bytes: float


class BadRequest(Exception):
    """What is to be compared cannot be; the message says why."""


Told: TypeAlias = Callable[[str, int, int], None]  # what is simulated, and how far: so many of all scale-ups


def run(scenario: Scenario, names: Sequence[str] = (), sweep: Sequence[str] = (), told: Told = lambda *far: None) -> list[Outcome]:
    """Each policy on the same trace, all of them without names, for each host memory of the sweep, or for the scenario's.

    Raises: BadRequest, BadTrace.
    """
    for name in names:
        if name not in POLICIES:
            raise BadRequest(f"there is no policy {name!r}: there are {', '.join(POLICIES)}")
    try:
        budgets = [Nodes(host_memory=each).host_memory for each in sweep] or [scenario.nodes.host_memory]  # type: ignore[arg-type]
    except ValidationError as error:
        raise BadRequest(f"--sweep: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    comparison = Comparison(scenario)
    runs = [(name, budget) for budget in budgets for name in names or POLICIES]
    return [
        comparison.outcome(name, budget, functools.partial(told, f"{name}, {number} of {len(runs)}"))
        for number, (name, budget) in enumerate(runs, 1)
    ]


class Comparison:
    """A scenario with its trace read. Raises: BadTrace, from the start on."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._trace: Trace = scenario.read_trace()
        self._sizes = scenario.sizes(self._trace.models)
        self._rungs = scenario.rungs
        self._episodes: Episodes = episodes(self._trace, scenario.cooldown_seconds, scenario.request_seconds, scenario.tokens_a_second)
        self._scored = self._episodes.begin >= (self._trace.seconds / 2 if scenario.score == "second half" else 0.0)
        if not self._scored.any():
            raise BadTrace("no scale-up is in the second half of the trace, which is scored: give a longer one, or score: all")

    def outcome(self, name: str, budget: float, told: Callable[[int, int], None] = lambda done, of: None) -> Outcome:
        """Of the policy with so much host memory, as Nodes.host_memory has it. Each by itself: their order is of no consequence."""
        host_bytes = budget if budget >= 0 else -budget * float(self._sizes.sum()) / self._scenario.nodes.count
        if name == ALWAYS_ON:
            return self._made(name, host_bytes, np.zeros(1), dict.fromkeys(NAMES, 0.0), {})
        given = self._scenario.nodes
        cluster = Cluster(given.count, given.gpus, given.gpu_memory, host_bytes, given.running, given.free_gpu_memory, given.disk_copies)
        policy = self._policy(name)
        result = Simulation(cluster, self._rungs, self._sizes.tolist(), self._episodes, policy, self._scenario.seed).run(told)
        seconds, rung = np.array(result.seconds)[self._scored], np.array(result.rung)[self._scored]
        shares = {each: float((rung == number).mean()) for number, each in enumerate(NAMES)}
        return self._made(name, host_bytes, seconds, shares, result.moved)

    def _policy(self, name: str) -> Policy:
        rungs, sizes = self._rungs, self._sizes
        saved = np.array([rungs.seconds(rungs.disk, size) - rungs.seconds(rungs.host, size) for size in sizes.tolist()])
        if name in _SIMPLE:
            return _SIMPLE[name](sizes, saved)
        if name == policies.Clairvoyant.name:
            first = np.full(len(sizes), np.inf)
            np.minimum.at(first, self._episodes.model, self._episodes.begin)
            return policies.Clairvoyant(sizes, saved, first)
        return policies.Zerowake(self._trace.models, sizes, saved, Forecast(), _START, self._scenario.objective.objective)

    def _made(self, name: str, host_bytes: float, seconds: Floats, shares: dict[str, float], moved: dict[str, float]) -> Outcome:
        p50, p99 = np.percentile(seconds, [50, 99])
        always = len(self._sizes) * self._trace.seconds / 3600
        running = float((np.minimum(self._episodes.end, self._trace.seconds) - self._episodes.begin).sum()) / 3600
        hours = always if name == ALWAYS_ON else running
        return Outcome(
            policy=name,
            host_bytes=host_bytes * self._scenario.nodes.count,
            free_gpu_memory=self._scenario.nodes.free_gpu_memory,
            scale_ups=0 if name == ALWAYS_ON else int(self._scored.sum()),
            in_memory=1.0 if name == ALWAYS_ON else sum(shares[each] for each in IN_MEMORY),
            mean_seconds=float(seconds.mean()),
            p50_seconds=float(p50),
            p99_seconds=float(p99),
            rungs=shares,
            gpu_hours=hours,
            gpu_hours_of_always_on=hours / always,
            loaded_bytes=moved.get("loaded", 0.0),
            ahead_bytes=moved.get("ahead", 0.0),
            copied_bytes=moved.get("copied", 0.0),
            wasted_bytes=moved.get("wasted", 0.0),
        )
