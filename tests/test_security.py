"""What deploy/SECURITY.md says is held by tests that are there; and what of it the chart alone says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm/zerowake"


@cache
def there() -> frozenset[str]:
    found = (re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE) for path in (ROOT / "tests").rglob("test_*.py"))
    return frozenset(name for each in found for name in each)


def named() -> list[str]:
    return sorted(set(re.findall(r"`(test_\w+)`", (ROOT / "deploy/SECURITY.md").read_text())))


def test_it_names_tests() -> None:
    assert len(named()) > 40


@pytest.mark.parametrize("name", named())
def test_each_test_is_there(name: str) -> None:
    assert name in there()


def test_every_row_of_a_table_names_one() -> None:
    """All but the heads; what a thief can do needs none, what he cannot does."""
    rows = [line for line in (ROOT / "deploy/SECURITY.md").read_text().splitlines() if line.startswith("| ") and "---" not in line]
    heads = ("| what listens |", "| stolen |")
    assert len(rows) > 15
    assert [row for row in rows if "`test_" not in row and not row.startswith(heads)] == []


def test_metrics_are_open_to_nobody_unless_the_chart_is_told_to_whom() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["networkPolicies"] == {"enabled": True, "metricsFrom": {}}
    opened = re.split(
        r"\{\{- with \.Values\.networkPolicies\.metricsFrom \}\}.*?\{\{- end \}\}",
        (CHART / "templates/network-policies.yaml").read_text(),
        flags=re.DOTALL,
    )
    assert len(opened) == 3 and all("port: metrics" not in part for part in opened)
