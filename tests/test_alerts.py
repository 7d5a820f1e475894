"""Every alert fires by its numbers and stops when they are well again, asks for metrics that there are, and has its part of the runbook.

What makes these numbers so in real programs: test_faults.py.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.worlds.metric_catalogue import ROOT, listed
from tests.worlds.prometheus_server import program
from tests.worlds.rules import RULES, alerts, records, text_of


@dataclass(frozen=True)
class Case:
    """series: a metric and its labels, and its values, one in so many minutes. fires, quiet: minutes, fires below zero: never; quiet before
    it fires: nobody is woken by what passes by itself. labels: of the alert, beside its severity."""

    series: dict[str, str]
    fires: int
    quiet: tuple[int, ...]
    labels: dict[str, str]
    every: int = 1


_LATE = 'zerowake_activation_seconds_bucket{model="m",origin="cold",le="5.0"}'
_SERVED = 'zerowake_activations_total{model="m",outcome="served"}'
_HELD = 'zerowake_gpumem_held_bytes{instance="a",gpu="GPU-1",use="%s"}'
_GPU = {"instance": "a", "gpu": "GPU-1"}
_WANTED = 'zerowake_gpumem_wanted_bytes{instance="a",gpu="GPU-1"}'
_ARENA = 'zerowake_gpumem_arena_bytes{instance="a",use="%s"}'
_DAY = 24 * 6  # in steps of ten minutes
_WEEK = 7 * 86400  # in seconds

CASES = {
    "ZerowakeActivationsLate": [
        # One a minute. All are late from minute 60 to 120; those of another model never are.
        Case(
            {
                _SERVED: "0+1x400",
                _LATE: "0+1x60 60x59 61+1x280",
                _SERVED.replace('"m"', '"n"'): "0+1x400",
                _LATE.replace('"m"', '"n"'): "0+1x400",
            },
            115,
            (60, 70, 200),
            {"model": "m"},
        ),
        # Nobody is served at all: there is no number of seconds.
        Case({'zerowake_activations_total{model="m",outcome="abandoned"}': "0+1x100 100x300"}, 90, (200,), {"model": "m"}),
        # A third of them, for hours.
        Case({_SERVED: "0+1x1200", _LATE: "0+0.6x800 480+1x400"}, 700, (1150,), {"model": "m"}),
        # One in a hundred is what the objective allows.
        Case({_SERVED: "0+1x1200", _LATE: "0+0.99x1200"}, -1, (100, 700, 1199), {}),
    ],
    "ZerowakeActivationsOftenLate": [
        Case(
            {_SERVED: f"0+10x{6 * _DAY}", _LATE: f"0+9x{2 * _DAY} {18 * _DAY}+10x{4 * _DAY}"},
            20 * _DAY,
            (30 * _DAY,),
            {"model": "m"},
            every=10,
        )
    ],
    "ZerowakeQueueRefusing": [
        Case(
            {f'zerowake_requests_refused_total{{model="m",reason="{reason}"}}': "_x5 1x20 2x20" for reason in ("no_replica", "bad_json")},
            26,
            (4, 15, 40),
            {"model": "m", "reason": "no_replica"},
        ),
        Case(
            {'zerowake_requests_refused_total{model="m",reason="too_many_requests"}': "_x5 1x20"},
            6,
            (12,),
            {"model": "m", "reason": "too_many_requests"},
        ),
    ],
    "ZerowakeColdFallbacks": [
        Case(
            {'zerowake_restore_fallbacks_total{model="m",reason="corrupt",instance="a"}': "_x5 1x60 2x40"},
            minute,
            (4, 40, 100),
            {"model": "m", "reason": "corrupt"},
        )
        for minute in (6, 70)
    ],
    "ZerowakeSourceSilent": [
        Case(
            {
                'zerowake_source_up{model="m",source="redis",instance="a"}': "1x3 0x10 1x5",
                'zerowake_source_up{model="m",source="redis",instance="b"}': "1x20",
                'zerowake_source_up{model="m",source="cron",instance="a"}': "1x20",
                'zerowake_source_up{model="n",source="redis",instance="a"}': "1x3 0x2 1x15",
            },
            10,
            (8, 16),
            {"model": "m", "source": "redis"},
        )
    ],
    "ZerowakeKedaNotConnected": [
        Case(
            {
                'zerowake_keda_streams_open{rpc="StreamIsActive",instance="a"}': "1x5 0x10 0x5",
                'zerowake_keda_streams_open{rpc="StreamIsActive",instance="b"}': "0x15 1x5",
                'zerowake_replicas{model="m",instance="a"}': "0x20",
            },
            9,
            (5, 7, 17),
            {},
        ),
        Case({'zerowake_keda_streams_open{rpc="StreamIsActive"}': "0x20"}, -1, (10,), {}),  # no model is declared
    ],
    "ZerowakeScaledWithoutKeda": [
        Case({'zerowake_scaled_without_keda_total{model="m",instance="a"}': "_x5 1x60 2x40"}, minute, (4, 40, 90), {"model": "m"})
        for minute in (6, 70)
    ],
    "ZerowakeAgentGone": [
        Case(
            {
                'zerowake_agent_up{node="n1",instance="a"}': "1x5 0x10 1x10",
                'zerowake_agent_up{node="n1",instance="b"}': "1x5 0x10 1x10",
                'zerowake_agent_up{node="n2",instance="a"}': "0x25",  # of one scaler alone
                'zerowake_agent_up{node="n2",instance="b"}': "1x25",
            },
            10,
            (7, 18),
            {"node": "n1"},
        )
    ],
    "ZerowakeStagingBehind": [
        Case({'zerowake_plan_staging_oldest_seconds{instance="a"}': "0+60x30 0x10"}, 14, (4, 9, 35), {}),
        Case({'zerowake_plan_staging_oldest_seconds{instance="a"}': "0+60x7 0+60x7 0+60x7"}, -1, (8, 15, 22), {}),
    ],
    "ZerowakeStagingFailing": [
        Case(
            {
                'zerowake_plan_stagings_total{rung="memory",result="failed"}': "_x5 1x20 2x100",
                'zerowake_plan_stagings_total{rung="disk",result="done"}': "0+1x120",
            },
            12,
            (6, 80),
            {"rung": "memory"},
        )
    ],
    "ZerowakeSnapshotUnusable": [
        Case(
            {
                'zerowake_node_snapshots{instance="a",state="whole"}': "3x5 2x15 3x5",
                'zerowake_node_snapshots{instance="a",state="corrupt"}': "0x25",
                'zerowake_node_snapshots{instance="a",state="untrusted"}': "0x5 1x15 0x5",
            },
            10,
            (5, 23),
            {"instance": "a", "state": "untrusted"},
        )
    ],
    "ZerowakeCaptureFailing": [
        Case(
            {'zerowake_capture_failures_total{model="m",reason="criu-failed"}': "_x5 1x60"},
            10,
            (4, 50),
            {"model": "m", "reason": "criu-failed"},
        )
    ],
    "ZerowakeCertificateEnds": [
        # The time of a test begins at zero. This one has a week and an hour left, and is renewed after two.
        Case(
            {'zerowake_tls_certificate_expiry_timestamp_seconds{instance="a",file="tls.crt"}': f"{_WEEK + 3600}x120 {12 * _WEEK}x20"},
            80,
            (30, 130),
            {"instance": "a", "file": "tls.crt"},
        )
    ],
    "ZerowakeGpumemSilent": [Case({'zerowake_gpumem_up{instance="a"}': "1x5 0x5 1x5"}, 8, (5, 6, 13), {"instance": "a"})],
    "ZerowakePoolNearlyFull": [
        Case(
            {
                _HELD % "free": "50x5 1x30 50x10",
                _HELD % "idle": "0x45",
                _HELD % "weights": "20x45",
                _HELD % "scratch": "30x5 79x30 30x10",
                _WANTED: "100x45",
            },
            25,
            (5, 15, 40),
            _GPU,
        ),
        # What nobody uses is given up, and a pool of which nothing is wanted is not full.
        Case({_HELD % "free": "0x40", _HELD % "idle": "60x40", _HELD % "scratch": "40x40", _WANTED: "100x40"}, -1, (30,), {}),
        Case({_HELD % "free": "0x40", _HELD % "idle": "0x40", _WANTED: "0x40"}, -1, (30,), {}),
    ],
    "ZerowakeArenaNearlyFull": [
        Case({_ARENA % "free": "50x5 1x30 50x10", _ARENA % "held": "50x5 99x30 50x10"}, 25, (15, 40), {"instance": "a"}),
        Case({_ARENA % "free": "0x40", _ARENA % "held": "0x40"}, -1, (30,), {}),  # there is none
        Case({_ARENA % "free": "0x40", _ARENA % "idle": "90x40", _ARENA % "held": "10x40"}, -1, (30,), {}),  # a cache that is full is well
    ],
    "ZerowakeGpuMemoryNotGivenBack": [
        Case({_HELD % "free": "60x5 0x30", _HELD % "scratch": "40x20 0x15", _WANTED: "100x5 0x30"}, 15, (5, 8, 25), _GPU)
    ],
    "ZerowakeGpuMemoryOwed": [
        Case({'zerowake_gpumem_owed_bytes{instance="a",gpu="GPU-1"}': "0x5 4096x15 0x5"}, 12, (5, 8, 22), _GPU),
    ],
}


def test_every_alert_has_its_numbers() -> None:
    assert CASES.keys() == alerts().keys()


@pytest.mark.parametrize(("alert", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_it_fires_and_stops(alert: str, case: Case, tmp_path: Path) -> None:
    rule = alerts()[alert]
    quiet = [{"alertname": alert, "eval_time": f"{minute}m", "exp_alerts": []} for minute in case.quiet]
    labels = rule["labels"] | case.labels
    annotations = {name: text_of(text, labels) for name, text in rule["annotations"].items()}
    fires = {"alertname": alert, "eval_time": f"{case.fires}m", "exp_alerts": [{"exp_labels": labels, "exp_annotations": annotations}]}
    test = {
        "interval": f"{case.every}m",
        "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
        "alert_rule_test": [*quiet, *([fires] if case.fires >= 0 else [])],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": f"{case.every}m", "tests": [test]}))
    done = subprocess.run([program("promtool"), "test", "rules", file], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "rules", "--lint-fatal", RULES], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_they_ask_for_metrics_that_there_are_and_labels_that_these_have() -> None:
    series = {name: metric for metric in listed().values() for name in metric.series}
    for name, rule in (alerts() | records()).items():
        asked = re.findall(r"(?<![\w:])(zerowake_\w+)(?:\{(.*?)\})?", rule["expr"])
        assert asked or "model:" in rule["expr"]
        for metric, selectors in asked:
            assert metric in series, f"{name} asks for {metric}"
            assert set(re.findall(r"(\w+)\s*[=!]", selectors)) - {"le"} <= set(series[metric].labels), (
                f"{name} asks {metric} by a label that it has not"
            )


@pytest.mark.parametrize("alert", alerts())
def test_it_says_what_to_do(alert: str) -> None:
    rule: dict[str, Any] = alerts()[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


def test_every_part_of_the_runbook_is_of_an_alert_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "deploy/prometheus/RUNBOOK.md").read_text()
    headings = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert set(headings) <= alerts().keys()
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {heading.lower() for heading in headings}
    for name in re.findall(r"zerowake_\w+", text):
        assert any(name in metric.series for metric in listed().values()), f"the runbook names {name}"
