"""What the GPU benchmarks keep: one file of `tests/bench/results/` for each benchmark and kind of card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
