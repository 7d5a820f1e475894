"""However an attempt fails, whoever asked for it hears one error with its reason."""

import asyncio
from pathlib import Path

import pytest

from restore_agent.drivers.criu import CriuError
from restore_agent.sequences.attempt import RestoreFailed, attempt
from restore_agent.snapshots.catalog import Snapshot
from restore_agent.snapshots.store import Store
from tests.worlds.snapshots import publish


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return publish(Store(tmp_path), b"one" * 8192, "one")


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (CriuError("it spins"), "criu-failed", "it spins"),
        (OSError(28, "No space left on device"), "io-error", "No space left on device"),
        (RestoreFailed("no-criu", "there is none"), "no-criu", "there is none"),
    ],
    ids=["of the agent's", "of the system's", "named already"],
)
async def test_a_failure_has_the_reason_of_its_cause(snapshot: Snapshot, error: Exception, reason: str, words: str) -> None:
    with pytest.raises(RestoreFailed, match=words) as failed:
        async with attempt(snapshot):
            raise error
    assert failed.value.reason == reason


async def test_one_that_takes_too_long_is_given_up(snapshot: Snapshot) -> None:
    with pytest.raises(RestoreFailed, match=r"snapshot .*: it took too long and was given up") as failed:
        async with attempt(snapshot, 0.0):
            await asyncio.Event().wait()
    assert failed.value.reason == "timeout"


async def test_a_bug_keeps_its_traceback(snapshot: Snapshot) -> None:
    with pytest.raises(ZeroDivisionError):
        async with attempt(snapshot):
            print(1 // 0)
