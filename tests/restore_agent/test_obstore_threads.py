"""A process that has no room for obstore's threads says so, and reads buckets once it has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import asyncio
from restore_agent.transfer.bucket import Bucket
from restore_agent.transfer.source import TransferError
from tests.worlds.exhausted import no_threads
from zerowake_shared.program_end import ends_at_once

bucket = Bucket("none-such")

async def asked():
    try:
        await bucket.size("key")
    except TransferError as error:
        print(type(error).__name__, error, flush=True)

with ends_at_once("asks"):
    with no_threads():
        asyncio.run(asked())
    asyncio.run(asked())
"""


def test_a_lack_of_threads_is_said_and_is_over_when_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    first, second = ran.stdout.splitlines()
    assert first.startswith("Unreachable buckets are read by ") and "raise the limit of processes" in first, ran
    assert second.startswith("Unreachable s3://none-such cannot be reached"), ran
    assert "panicked" not in ran.stderr
