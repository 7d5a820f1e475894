"""A capture that failed, as far as that matters to the next one."""

from __future__ import annotations

from dataclasses import dataclass, field

from zerowake_shared.backoff import Backoff

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 30.0, 1800.0


def _retries() -> Backoff:
    return Backoff(FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS)


@dataclass(slots=True)
class FailedCapture:
    """When a template's capture is tried again, why the last one failed, and which pod's that was: old news bring it up again."""

    backoff: Backoff = field(default_factory=_retries)
    not_before: float = 0.0
    reason: str = "CaptureFailed"
    why: str = ""
    pod: str = ""
    contents: str | None = None  # that stood behind the environment then; None: not looked at since
