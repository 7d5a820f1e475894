"""A GPU's figures are kept under its kind, whatever else its driver says in its name; and shown as tables."""

import json
from pathlib import Path

import pytest

from tests.bench.figures import Figure
from tests.bench.gpu import results
from tests.bench.gpu.results import card, keep, markdown, parts


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Quadro", "quadro"),
    ],
)
def test_a_card_is_named_by_its_kind(name: str, kind: str) -> None:
    assert card(name) == kind


def test_where_the_time_went_is_each_phase_s_median() -> None:
    rounds = [{"held": 0.001, "weights": 0.300}, {"held": 0.003, "weights": 0.290}, {"held": 0.002, "image": 0.030}]
    assert parts(rounds) == "held 2, weights 290, image 0"
    assert parts(rounds[:1]) == "held 1, weights 300"


def test_measurements_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    kept = {}
    for card_, seconds in (("NVIDIA H100 80GB HBM3", 0.0312), ("NVIDIA H200", 0.0389)):
        figures = [Figure("from zero, parked, made ahead", seconds, "s", at_most=0.035), Figure("pages", 777148, "")]
        more = [Figure("only here", 1.5, "MB")] if seconds > 0.035 else []
        path = keep("parked-GPU-qwen3-8b", "a command", {"gpus": [card_]}, [*figures, *more])
        kept[path.stem] = json.loads(path.read_text())
    assert markdown(kept).splitlines() == [
        "| figure | parked-h100-qwen3-8b | parked-h200-qwen3-8b | goal | |",
        "| --- | ---: | ---: | ---: | --- |",
        "| from zero, parked, made ahead | 0.0312 s | 0.0389 s | ≤ 0.035 s | **missed** |",
        "| pages | 777,148 | 777,148 |  |  |",
        "| only here |  | 1.5 MB |  |  |",
    ]
