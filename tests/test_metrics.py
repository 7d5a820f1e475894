"""The catalogue of metrics: it is what the code declares and what real programs show, in Prometheus' conventions, and its table is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds.command import zerowake
from tests.worlds.machine import machine
from tests.worlds.metric_catalogue import bounds, declared, listed, shown, table, table_of_readme, unit_of
from tests.worlds.prometheus_server import program

_ENGINE, _PORT = Path(__file__).parent / "worlds/hashing_engine.py", 8000
_MEND = "run `python -m tests.worlds.metric_catalogue` and look at what it has changed"


def test_it_names_what_the_code_declares() -> None:
    assert listed() == declared(), _MEND


def test_its_table_stands_in_the_readme() -> None:
    assert table_of_readme() == table(), _MEND


@pytest.mark.parametrize("name", listed())
def test_a_name_keeps_the_conventions(name: str) -> None:
    metric = listed()[name]
    assert re.fullmatch(r"zerowake(_[a-z0-9]+)+", name)
    assert name.endswith("_total") == (metric.type == "counter")
    assert metric.unit == unit_of(name)
    assert metric.unit or metric.type != "histogram", "a histogram is of something that has a unit"
    assert metric.help and "\n" not in metric.help


def test_every_label_is_bounded_and_every_bound_is_of_a_label() -> None:
    assert bounds().keys() == {label for metric in listed().values() for label in metric.labels}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for CRIU and namespaces")
async def test_real_programs_show_what_it_names(tmp_path: Path) -> None:
    """After a request from zero. promtool looks at the same pages."""
    (tmp_path / "weights.bin").write_bytes(os.urandom(1 << 20))
    state, command = tmp_path / "state", [sys.executable, str(_ENGINE), str(_PORT), "4", str(tmp_path / "weights.bin")]
    await zerowake("snapshot", "create", "tiny", "--state", str(state), "--port", str(_PORT), "--canary", "/sum", "--", *command)
    series = {name: metric for metric in listed().values() for name in metric.series}
    async with machine(state, {"tiny": {"snapshot": "tiny"}}) as made:
        assert await made.ask("tiny", "/sum") == 200
        exemplars = await made.page("scaler", "application/openmetrics-text;version=1.0.0")
        assert re.search(r'zerowake_activation_seconds_bucket\{[^}]*\} 1.0 # \{activation="[0-9a-f]{12}"\}', exemplars)
        for process in ("scaler", "agent"):
            page = await made.page(process)
            found = shown(page)
            assert found
            for name, labels in found.items():
                assert name in series, f"the {process} shows {name}, which the catalogue does not name"
                assert process in series[name].processes
                assert labels - {"le"} <= set(series[name].labels), name
            for family, text in re.findall(r"^# HELP (zerowake_\w+) (.*)$", page, re.MULTILINE):
                if not family.endswith("_created"):
                    assert listed()[family].help == text.rstrip("."), family
            linted = subprocess.run(
                [program("promtool"), "check", "metrics"], input=page, capture_output=True, text=True, timeout=60, check=False
            )
            assert linted.returncode == 0, linted.stdout + linted.stderr
