"""What the GPU benchmarks keep: one file of `tests/bench/results/` for each benchmark and kind of card.

`python -m tests.bench.gpu.results FILE…` prints the figures of such files as the tables of tests/bench/README.md, one column a file.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench.__main__ import RESULTS, specs
from tests.bench.figures import Figure


def keep(
    file: str,
    command: str,
    machine: Mapping[str, Any],
    figures: Iterable[Figure] = (),
    **more: Any,
) -> Path:
    """Writes a run and returns its file. In `file` the word GPU becomes the card's kind.

    Args:
        machine: what is told beside `specs`; `gpus` are the cards' names.
    """
    run = {
        "command": command,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**specs(), **machine},
        **more,
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
    }
    path = RESULTS / f"{file.replace('GPU', card(machine['gpus'][0]))}.json"
    path.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n")
    return path


def card(name: str) -> str:
    """A GPU's kind, of the name that its driver gives: h100 of "NVIDIA H100 80GB HBM3". It is the first word with a digit."""
    words = name.lower().split()
    return next((word for word in words if any(letter.isdigit() for letter in word)), words[-1])


def parts(rounds: Sequence[Mapping[str, float]]) -> str:
    """Where the time of an activation went: of each phase the median, in milliseconds. One that was not in a round took nothing there."""
    names = dict.fromkeys(name for phases in rounds for name in phases)
    return ", ".join(f"{name} {statistics.median(phases.get(name, 0.0) for phases in rounds) * 1000:.0f}" for name in names)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def markdown(runs: Mapping[str, Any]) -> str:
    """A row for each figure. `runs`: what `keep` wrote, by what stands above its column."""
    cells: dict[str, dict[str, Any]] = {}
    for column, run in runs.items():
        for figure in run["figures"]:
            cells.setdefault(figure["name"], {})[column] = figure
    lines = [f"| figure | {' | '.join(runs)} | goal | |", f"| --- |{' ---: |' * len(runs)} ---: | --- |"]
    for name, found in cells.items():
        one = Figure(**{key: value for key, value in next(iter(found.values())).items() if key != "met"})
        values = [f"{_number(found[column]['value'])} {one.unit}".strip() if column in found else "" for column in runs]
        met = [found[column]["met"] for column in runs if column in found]
        verdict = "" if one.met is None else "met" if all(met) else "**missed**"
        lines.append(f"| {name} | {' | '.join(values)} | {'' if one.met is None else one.goal.strip()} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown({Path(file).stem: json.loads(Path(file).read_text()) for file in sys.argv[1:]}))
