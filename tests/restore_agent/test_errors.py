"""The family of errors: its reasons are the keys of a metric, and of what the agent says to the scaler."""

from __future__ import annotations

import pytest

from restore_agent.drivers.criu import CriuError
from restore_agent.drivers.cuda import CudaError
from restore_agent.drivers.weights import WeightsError
from restore_agent.engine.engine import EngineError
from restore_agent.errors import FAILURES, AgentError, ErrorKind, kind_of, reason_of
from restore_agent.kubernetes.calling_pod import Refused
from restore_agent.pages.fill import FillError
from restore_agent.places.container_error import ContainerError
from restore_agent.places.place import PlaceError
from restore_agent.sequences.attempt import RestoreFailed
from restore_agent.sequences.memory_budget import NoMemory
from restore_agent.sequences.placement import NoGpuMemory
from restore_agent.sequences.replicas import NoReplica
from restore_agent.service.messages import InvalidField
from restore_agent.snapshots.catalog import Corrupt, NotFound
from restore_agent.snapshots.compatibility import Incompatible
from restore_agent.snapshots.manifest import InvalidName
from restore_agent.snapshots.store import NameTaken


@pytest.mark.parametrize(
    ("error", "reason", "kind"),
    [
        (NotFound(), "not-found", ErrorKind.NOT_FOUND),
        (NoReplica(), "no-replica", ErrorKind.NOT_FOUND),
        (NameTaken(), "exists", ErrorKind.EXISTS),
        (InvalidName(), "invalid", ErrorKind.INVALID),
        (InvalidField(), "invalid", ErrorKind.INVALID),
        (Refused(), "refused", ErrorKind.INVALID),
        (Corrupt(), "corrupt", ErrorKind.PRECONDITION),
        (Incompatible(), "incompatible", ErrorKind.PRECONDITION),
        (FillError(), "fill-failed", ErrorKind.PRECONDITION),
        (CudaError(), "cuda-failed", ErrorKind.PRECONDITION),
        (WeightsError(), "weights-failed", ErrorKind.PRECONDITION),
        (PlaceError(), "sandbox-failed", ErrorKind.PRECONDITION),
        (ContainerError(), "sandbox-failed", ErrorKind.PRECONDITION),
        (CriuError(), "criu-failed", ErrorKind.PRECONDITION),
        (EngineError(), "engine-failed", ErrorKind.PRECONDITION),
        (RestoreFailed("no-criu", "there is none"), "no-criu", ErrorKind.PRECONDITION),
        (NoMemory(), "no-memory", ErrorKind.EXHAUSTED),
        (NoGpuMemory("full", {}), "no-gpu-memory", ErrorKind.EXHAUSTED),
        (TimeoutError(), "timeout", ErrorKind.EXHAUSTED),
        (OSError(), "io-error", ErrorKind.EXHAUSTED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_reasons_and_kinds(error: AgentError | OSError, reason: str, kind: ErrorKind) -> None:
    assert isinstance(error, FAILURES)
    assert (reason_of(error), kind_of(error)) == (reason, kind)
