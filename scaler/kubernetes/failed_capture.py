"""A capture that failed, as far as that matters to the next one."""

from __future__ import annotations

from dataclasses import dataclass, field

from scaler.kubernetes.resources import ModelSnapshot
from zerowake_shared.backoff import Backoff
from zerowake_shared.kubernetes.informer import Key

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


class FailedCaptures:
    """Of all objects, each with the template that it was of."""

    def __init__(self) -> None:
        self._found: dict[tuple[Key, str], FailedCapture] = {}

    def of(self, snapshot: ModelSnapshot, contents: str) -> FailedCapture | None:
        """How captures of this very template and of what stands behind it have failed; None: none has."""
        failed = self._found.get((snapshot.key, snapshot.template_hash))
        if failed and failed.contents is None:
            failed.contents = contents
        if failed and failed.contents != contents:
            self.forget_template(snapshot)
            failed = None
        return failed

    def again(self, snapshot: ModelSnapshot) -> FailedCapture:
        """The same, to which the next failure is added."""
        return self._found.setdefault((snapshot.key, snapshot.template_hash), FailedCapture())

    def forget_template(self, snapshot: ModelSnapshot) -> None:
        """It was captured, or another thing is."""
        self._found.pop((snapshot.key, snapshot.template_hash), None)

    def forget(self, key: Key) -> None:
        """The object is gone."""
        self._found = {each: failure for each, failure in self._found.items() if each[0] != key}
