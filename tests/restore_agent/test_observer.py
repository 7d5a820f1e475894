"""What an observer is told of a capture: that it was taken, or why not."""

from __future__ import annotations

import asyncio

import pytest

from restore_agent.errors import AgentError
from restore_agent.sequences.observer import capture_told
from restore_agent.service import metrics


class NotQuiet(AgentError):
    """The engine is busy."""

    reason = "busy"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    heard: list[tuple[str, object]] = []
    monkeypatch.setattr(metrics, "captured", lambda model, seconds: heard.append((model, seconds > 0)))
    monkeypatch.setattr(metrics, "capture_failed", lambda model, reason: heard.append((model, reason)))
    return heard


def test_one_that_was_taken(told: list[tuple[str, object]]) -> None:
    with capture_told(metrics, "m"):
        assert told == [], "nothing yet"
    assert told == [("m", True)]


@pytest.mark.parametrize(("error", "reason"), [(NotQuiet(), "busy"), (OSError("disk"), "io-error")])
def test_one_that_failed_is_told_with_its_reason_and_goes_on_to_whoever_asked(
    told: list[tuple[str, object]], error: Exception, reason: str
) -> None:
    with pytest.raises(type(error)), capture_told(metrics, "m"):
        raise error
    assert told == [("m", reason)]


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyError("a bug")])
def test_one_that_was_cancelled_or_met_a_bug_is_neither(told: list[tuple[str, object]], error: BaseException) -> None:
    with pytest.raises(type(error)), capture_told(metrics, "m"):
        raise error
    assert told == []
