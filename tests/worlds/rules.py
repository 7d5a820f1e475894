"""The rules of deploy/prometheus/rules.yaml, by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).parents[2] / "deploy/prometheus/rules.yaml"


def _rules(kind: str) -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule[kind]: rule for group in groups for rule in group["rules"] if kind in rule}


def alerts() -> dict[str, dict[str, Any]]:
    return _rules("alert")


def records() -> dict[str, dict[str, Any]]:
    return _rules("record")


def text_of(annotation: str, labels: dict[str, str]) -> str:
    """What an annotation says of an alert with these labels; it uses no more of Prometheus' templates than them."""
    for name, value in labels.items():
        annotation = annotation.replace(f"{{{{ $labels.{name} }}}}", value)
    return annotation
