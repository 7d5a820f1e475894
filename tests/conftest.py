"""What every test needs to know of the machine it runs on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worlds.s3_server import S3Server, s3_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are shown as skipped, with what they need, where there is none."""
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and its driver (/dev/nvidiactl is missing)"))


@pytest.fixture(scope="session")
def s3_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_at: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server that this process has the credentials of, and no others."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_at.environment().items():
        monkeypatch.setenv(name, value)
    return s3_at


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """An empty one for this test alone."""
    return s3.make_bucket(f"bucket-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}")
