"""The scenario's file: what is read from it, and what it cannot say."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaler.local.config import BadConfig
from scaler.plan.worth import OBJECTIVES, Objective
from scaler.simulate.scenario import load

MIX = "models: {count: 10, mix: [{share: 0.6, bytes: 16GB}, {share: 0.4, bytes: [28 GB, 64GiB]}]}\n"
DAILY = "trace: {daily: {days: 2}}\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "simulation.yaml"
    path.write_text(text)
    return path


def test_defaults_and_units(tmp_path: Path) -> None:
    found = load(written(tmp_path, MIX + DAILY + "objective: {hits: 0, tail: 2}\nnodes: {host_memory: 5%}\n"))
    assert (found.nodes.count, found.nodes.gpu_memory, found.nodes.host_memory) == (6, 141e9, -0.05)
    assert found.models.mix[1].bytes == (28e9, 64 * 2**30)
    assert found.objective.objective == Objective(0, 0, 2)
    sizes = found.sizes([f"model-{number}" for number in range(10)])
    assert sorted(sizes)[:6] == [16e9] * 6 and all(28e9 <= each <= 64 * 2**30 for each in sorted(sizes)[6:])
    assert found.sizes([f"model-{number}" for number in range(10)]).tolist() == sizes.tolist()


@pytest.mark.parametrize("name", ["mean", "p99"])
def test_an_objective_may_be_named_as_a_scaler_names_it(tmp_path: Path, name: str) -> None:
    assert load(written(tmp_path, MIX + DAILY + f"objective: {name}\n")).objective.objective == OBJECTIVES[name]


def test_paths_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("1,b,0\n")
    found = load(written(tmp_path, "models: {list: {a: 1GB, b: 2GB}}\ntrace: {csv: trace.csv}\n"))
    trace = found.read_trace()
    assert (trace.models, trace.model.tolist(), found.sizes(trace.models).tolist()) == (["a", "b"], [1], [1e9, 2e9])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (MIX, "trace: Field required"),
        (MIX + "trace: {}\n", "trace: give one of csv, servegen and daily"),
        (MIX + DAILY + "nodes: {gpu_memory: much}\n", "nodes.gpu_memory: 'much' is no number of bytes, such as 141GB or 80GiB (line 3)"),
        (MIX + DAILY + "nodes: {host_memory: x%}\n", "nodes.host_memory: 'x%' is no share of all weights, such as 10%"),
        (MIX + DAILY + "nodes: {host_memory: -5}\n", "nodes.host_memory: -5 is less than nothing"),
        (MIX + DAILY + "nodes: {gpu_memory: 60GB}\n", "a model of 68.7195 GB and what it takes beside its weights fit on no GPU of 60 GB"),
        (MIX + DAILY + "nodes: {count: 2, disk_copies: 3}\n", "nodes.disk_copies is 3, and there are 2 nodes"),
        (MIX + DAILY + "objective: {hits: 0}\n", "objective: hits, mean and tail are all 0"),
        (MIX + DAILY + "objective: p50\n", "objective: there is no objective 'p50': there are mean, p99, or weights"),
        (MIX + DAILY + "seeds: 3\n", "seeds: Extra inputs are not permitted (line 3)"),
        (MIX.replace("0.4", "0.3") + DAILY, "models: the shares of mix add up to 0.9, not to 1 (line 1)"),
        ("models: {}\n" + DAILY, "models: give list (NAME: BYTES), or mix"),
        (MIX + DAILY + DAILY, "line 3: the key 'trace' stands here and in line 2 already"),
    ],
)
def test_an_impossible_file_is_one_line_that_names_the_place(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(BadConfig) as raised:
        load(written(tmp_path, text))
    assert why in str(raised.value) and "\n" not in str(raised.value)
    assert str(tmp_path / "simulation.yaml") in str(raised.value)
