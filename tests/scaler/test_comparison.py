"""Policies over traces that can be followed by hand: where each scale-up finds its bytes, and who is ranked where."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaler.simulate import comparison
from scaler.simulate.comparison import POLICIES, BadRequest, Outcome, run
from scaler.simulate.policies import Lru
from scaler.simulate.scenario import Scenario, load
from scaler.simulate.trace import BadTrace

# Host memory for one of the two models; a request takes a second, a replica stays a minute longer.
SMALL = """
nodes: {count: 1, gpus: 1, gpu_memory: 40GB, host_memory: HOST, free_gpu_memory: FREE, running: 1GB}
models: {list: {a: 10GB, b: 10GB}}
cooldown_seconds: 60
request_seconds: 1
score: all
trace: {csv: trace.csv}
"""
DAILY = """
seed: 7
nodes: {count: 2, gpus: 2, gpu_memory: 80GB, host_memory: 20%, free_gpu_memory: false, running: 4GB}
models: {count: 24, mix: [{share: 0.75, bytes: 16GB}, {share: 0.25, bytes: [20GB, 60GB]}]}
cooldown_seconds: 60
trace: {daily: {days: 4, visits_a_day: 10, spread_seconds: 1200}}
"""


@pytest.fixture
def small(tmp_path: Path):
    def made(visits: str, host: str = "10GB", free: str = "false") -> Scenario:
        lines = [f"{1000 * number},{model},0\n" for number, model in enumerate(visits) if model != "."]
        (tmp_path / "trace.csv").write_text("".join(lines))
        (tmp_path / "simulation.yaml").write_text(SMALL.replace("HOST", host).replace("FREE", free))
        return load(tmp_path / "simulation.yaml")

    return made


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    path = tmp_path_factory.mktemp("daily") / "daily.yaml"
    path.write_text(DAILY)
    return load(path)


@pytest.fixture(scope="module")
def outcomes(daily: Scenario) -> dict[str, Outcome]:
    return {each.policy: each for each in run(daily)}


def of(scenario: Scenario, policy: str) -> Outcome:
    (found,) = run(scenario, [policy])
    return found


@pytest.mark.parametrize(
    ("policy", "visits", "in_memory"),
    [
        ("cold", "aaaa", 0),
        ("lru", "aaaa", 3),
        ("lru", "abab", 0),  # the last one takes the only room
        ("lru", "aabb", 2),
        ("lru-blind", "aabb", 2),  # there is one node to be blind to
        ("serverlessllm", "aabb", 2),
        ("greedy-dual", "aaaba", 3),  # a's three uses outweigh b's one
        ("lru", "aaaba", 2),
        ("keep-alive", "aaaa", 0),  # 939 s idle: longer than ten minutes
        ("belady", "abaabb", 3),  # a stays while b is next after it
        ("belady", "aba", 1),  # b is never asked for again
    ],
)
def test_where_bytes_are_found(small, policy: str, visits: str, in_memory: int) -> None:
    found = of(small(visits), policy)
    assert (found.scale_ups, round(found.in_memory * len(visits))) == (len(visits), in_memory)
    assert found.rungs["host"] + found.rungs["disk"] == pytest.approx(1)
    assert found.loaded_bytes == pytest.approx(10e9 * (len(visits) - in_memory))


def test_seconds_are_those_of_the_estimate(small) -> None:
    found = of(small("aaaa"), "lru")
    disk, host = 0.36 + 10 / 5, 0.36 + 0.26
    assert found.mean_seconds == pytest.approx((disk + 3 * host) / 4)
    assert found.p50_seconds == pytest.approx(host)


def test_weights_stay_on_a_gpu_that_nobody_needs(small) -> None:
    found = of(small("abab", host="1GB", free="true"), "lru")
    assert (found.rungs["gpu"], found.rungs["disk"]) == (0.5, 0.5)


def test_clairvoyance_fetches_what_is_next(small) -> None:
    assert of(small("ababab"), "clairvoyant").in_memory == pytest.approx(5 / 6)  # for the very first one no time was left
    assert of(small("ababab"), "belady").in_memory < 0.5


def test_gpu_hours_do_not_depend_on_the_policy(small) -> None:
    cold, always = run(small("aaaa"), ["cold", "always-on"])
    assert cold.gpu_hours == pytest.approx((3 * 61 + 1) / 3600)  # the trace ends a second after its last request
    assert (always.gpu_hours, always.gpu_hours_of_always_on) == (pytest.approx(2 * 3001 / 3600), 1)
    assert always.mean_seconds == 0


def test_the_same_seed_is_the_same_run(daily: Scenario, outcomes: dict[str, Outcome]) -> None:
    again = ["zerowake", "histogram", "lru-blind"]
    assert run(daily, again) == [outcomes[name] for name in again]
    assert of(daily.model_copy(update={"seed": 8}), "lru") != outcomes["lru"]


def test_clairvoyance_bounds_all_and_the_product_comes_next(outcomes: dict[str, Outcome]) -> None:
    found = {name: each.in_memory for name, each in outcomes.items() if name != "always-on"}
    assert max(found, key=found.__getitem__) == "clairvoyant"
    assert found["belady"] > max(value for name, value in found.items() if name not in ("belady", "clairvoyant", "zerowake"))
    assert found["zerowake"] > found["lru"] > found["cold"] == 0


def test_a_bad_policy_is_ranked_last(daily: Scenario, outcomes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    class Mru(Lru):
        """Who was used last leaves first."""

        name = "mru"

        def ended(self, model: int, at: float, following: float) -> None:
            self.numbers[model] = -at

    monkeypatch.setitem(comparison._SIMPLE, "mru", Mru)
    monkeypatch.setattr(comparison, "POLICIES", (*POLICIES, "mru"))
    others = [each for name, each in outcomes.items() if name not in ("cold", "lru-blind", "keep-alive", "always-on")]
    assert of(daily, "mru").in_memory < min(each.in_memory for each in others)


def test_more_host_memory_finds_more(daily: Scenario) -> None:
    found = run(daily, ["lru"], ["10%", "30%", "200GB"])
    assert [each.in_memory for each in found] == sorted(each.in_memory for each in found)
    assert found[2].host_bytes == 2 * 200e9


def test_what_cannot_be_compared_is_said(daily: Scenario) -> None:
    with pytest.raises(BadRequest, match="there is no policy 'best': there are always-on, cold, "):
        run(daily, ["best"])
    with pytest.raises(BadRequest, match="--sweep: 'x%' is no share of all weights, such as 10%"):
        run(daily, ["lru"], ["x%"])


def test_a_trace_too_short_to_be_scored_is_an_error(small) -> None:
    scenario = small("a.......").model_copy(update={"score": "second half"})
    with pytest.raises(BadTrace, match="no scale-up is in the second half"):
        run(scenario, ["lru"])
