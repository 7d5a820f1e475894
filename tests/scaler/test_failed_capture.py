"""Captures that failed are remembered by object, template and what stands behind the environment."""

from __future__ import annotations

from scaler.kubernetes.failed_capture import FailedCaptures
from scaler.kubernetes.resources import Metadata, ModelSnapshot, Spec


def snapshot(name: str = "chat", port: int = 8000) -> ModelSnapshot:
    return ModelSnapshot(Metadata(name=name, namespace="tenant"), Spec(port=port))


def test_a_failure_counts_for_its_template_until_what_stands_behind_it_changes() -> None:
    failures = FailedCaptures()
    assert failures.of(snapshot(), "c") is None
    failed = failures.again(snapshot())
    failed.why = "no room"
    assert failures.of(snapshot(port=1), "c") is None, "another template"
    assert failures.of(snapshot(), "c") is failed is failures.again(snapshot()), "the first look notes what stands behind it"
    assert failures.of(snapshot(), "other") is None
    assert failures.of(snapshot(), "c") is None, "and it is forgotten for good"


def test_what_was_captured_or_is_gone_is_forgotten() -> None:
    failures = FailedCaptures()
    for each in (snapshot(), snapshot(port=1), snapshot("other")):
        failures.again(each)
    failures.forget_template(snapshot())
    assert failures.of(snapshot(), "") is None and failures.of(snapshot(port=1), "")
    failures.forget(("tenant", "chat"))
    assert failures.of(snapshot(port=1), "") is None and failures.of(snapshot("other"), "")
