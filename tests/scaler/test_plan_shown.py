"""What `zerowake plan` prints, line by line."""

from __future__ import annotations

from typing import Any

import pytest

from scaler.view import plan_shown
from zerowake_shared import tables

ACTION = {"do": "stage", "model": "chat", "node": "one", "rung": "memory", "why": "requests wait for it"}
PUT_OFF = {"do": "stage", "snapshot": "team/chat", "digest": "d", "node": "two", "rung": "memory", "for_seconds": 29.6, "why": "no room"}
CHAT: dict[str, Any] = {
    "name": "chat",
    "snapshot": "team/chat",
    "stage": "memory",
    "pin": "disk",
    "copies": 2,
    "replicas_wanted": None,
    "stands": [
        {"node": "one", "rung": "memory", "weights": "gpu", "seconds": 0.3, "why": "its owner wishes it so (stage: memory)"},
        {"node": "two", "rung": "disk", "weights": "", "seconds": None, "why": "not in memory: no room"},
    ],
}
COLD: dict[str, Any] = {"name": "cold", "snapshot": "", "stage": "memory", "pin": "", "copies": 1, "replicas_wanted": 1, "stands": []}
PAGE: dict[str, Any] = {"missing": "", "models": [CHAT, COLD], "under_way": [ACTION], "put_off": [PUT_OFF], "would_do": []}
NODE = {
    "node": "one",
    "bytes": 3 << 30,
    "image_bytes": 1 << 30,
    "seconds_to_serve": 0.3,
    "seconds_to_stage": 0.0,
    "seconds_saved_in_memory": 0.0,
    "memory_staged_bytes": 1 << 30,
    "memory_limit_bytes": 4 << 30,
}
WHY: dict[str, Any] = CHAT | {
    "missing": "",
    "demand": {"held": 1, "in_flight": 2, "elsewhere": 3, "replicas": 4, "unknown": "redis is silent"},
    "chance": {
        "within_seconds": 600.0,
        "chance": 0.25,
        "idle_seconds": 42.0,
        "as_long_seconds": (30.0, 90.0),
        "own_ends": 3.0,
        "own_per_second": 0.001,
        "pooled_per_second": 0.002,
        "per_second": 0.003,
        "seasons": {"hour": (1.5, True), "weekday": (0.9, False)},
        "credit_nats": 1.25,
        "all_credit_nats": -3.0,
    },
    "ahead": {
        "decision": "staged",
        "why": "there is room",
        "chance": 0.25,
        "within_seconds": 600.0,
        "node": "one",
        "saved_seconds": 1.5,
        "bytes": 1 << 30,
        "worth": 0.625 / (1 << 30),
        "objective": {"hits": 1.0, "mean": 1.0, "tail": 0.0},
    },
    "nodes": [NODE, NODE | {"node": "two", "seconds_to_serve": None, "seconds_saved_in_memory": None, "memory_limit_bytes": None}],
    "under_way": [],
    "put_off": [PUT_OFF],
    "would_do": [ACTION],
    "unmet": "",
    "looks_again_in_seconds": 29.6,
}


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan_shown.show(tables.console(), PAGE, dry_run=False)
    assert said(capsys) == [
        "MODEL SNAPSHOT WAITS NODE RUNG SECONDS WHY",
        "chat team/chat memory one memory, weights gpu 0.3 s its owner wishes it so (stage: memory)",
        "two disk never not in memory: no room",
        "cold - memory - - - it has no snapshot: it is started cold",
        "",
        "UNDER WAY MODEL NODE TO WHY",
        "stage chat one memory requests wait for it",
        "",
        "PUT OFF SNAPSHOT NODE TO FOR WHY",
        "stage team/chat two memory 30 s no room",
    ]


def test_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    plan_shown.show(tables.console(), {"missing": "", "would_do": [], "would_move_ahead": []}, dry_run=True)
    assert said(capsys) == ["nothing would be done now", "nothing would be moved ahead of need"]
    ends = {"do": "end", "model": "chat", "node": "one", "rung": "", "replica": "r1", "why": "0 wanted"}
    starts = {"do": "start", "model": "cold", "node": "", "rung": "", "replicas": 2, "why": "3 requests wait"}
    plan_shown.show(tables.console(), {"missing": "", "would_do": [ends, starts], "would_move_ahead": [ACTION]}, dry_run=True)
    assert said(capsys) == [
        "WOULD DO MODEL NODE TO WHY",
        "end chat one r1 0 wanted",
        "start cold - 2 3 requests wait",
        "AHEAD OF NEED MODEL NODE TO WHY",
        "stage chat one memory requests wait for it",
    ]


def test_every_term_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    plan_shown.show_why(tables.console(), WHY)
    assert said(capsys) == [
        "model: chat",
        "snapshot: team/chat",
        "waits: stage memory, 2 copies, pinned: disk",
        "demand: 1 held, 2 in flight, 3 elsewhere, 4 replicas; unknown: redis is silent",
        "chance: 25.0% within 600 s: idle for 42 s",
        "own: 3 idle times ended at 30 to 90 s: 3.6 requests an hour",
        "pooled: of all models: 7.2 requests an hour",
        "together: 10.8 requests an hour now, with the hour and the weekday where they count",
        "factors: hour 1.50 (counts), weekday 0.90 (does not count)",
        "credit: +1.2 nats against its mean rate; of all models -3.0",
        "ahead of need: staged: there is room",
        "worth: 0.625 a GiB: 25.0% within 600 s × (a hit + 1.5 s saved) ÷ 1.00 GiB, on one",
        "looks again: in 30 s",
        "",
        "NODE RUNG BYTES SECONDS TO STAGE SAVED IN MEMORY IMAGES THERE WHY",
        "one memory 3.00 GiB 0.3 s 0 s 0 s 1.00 GiB of 4.00 GiB its owner wishes it so (stage: memory)",
        "two disk 3.00 GiB never 0 s never 1.00 GiB of - not in memory: no room",
        "",
        "nothing is under way",
        "WOULD DO MODEL NODE TO WHY",
        "stage chat one memory requests wait for it",
        "",
        "PUT OFF SNAPSHOT NODE TO FOR WHY",
        "stage team/chat two memory 30 s no room",
    ]


@pytest.mark.parametrize(
    ("objective", "gain"),
    [
        ({"hits": 1.0, "mean": 0.0, "tail": 1.0}, "(a hit + (1.5 s saved)²)"),
        ({"hits": 0.0, "mean": 2.5, "tail": 0.0}, "(2.5 × 1.5 s saved)"),
    ],
)
def test_worth_is_shown_as_the_objective_has_it(objective: dict[str, float], gain: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan_shown.show_why(tables.console(), WHY | {"ahead": WHY["ahead"] | {"objective": objective}})
    assert f"worth: 0.625 a GiB: 25.0% within 600 s × {gain} ÷ 1.00 GiB, on one" in said(capsys)


def test_a_model_without_a_snapshot_that_the_forecast_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    cold = (
        WHY
        | COLD
        | {"chance": None, "ahead": None, "nodes": [], "put_off": [], "would_do": [], "unmet": "no room", "looks_again_in_seconds": None}
    )
    plan_shown.show_why(tables.console(), cold | {"missing": "nodes could not be listed so far"})
    lines = said(capsys)
    assert lines[:2] == ["This scaler does not know all of it: nodes could not be listed so far. Ask again, or another replica.", ""]
    assert "snapshot: none: it is started cold" in lines and "replicas wanted: 1; no room" in lines
    assert "chance: the forecast does not know it" in lines and "it has no snapshot, so nothing is staged for it" in lines
    plan_shown.show_why(tables.console(), WHY | {"nodes": [], "stands": [], "chance": WHY["chance"] | {"chance": 1.0}})
    lines = said(capsys)
    assert "chance: it is asked for now" in lines and "no node has its snapshot" in lines


def test_the_longest_idle_times_have_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    plan_shown.show_why(tables.console(), WHY | {"chance": WHY["chance"] | {"as_long_seconds": (590490.0, None)}})
    assert "own: 3 idle times ended at 590490 s and more: 3.6 requests an hour" in said(capsys)
