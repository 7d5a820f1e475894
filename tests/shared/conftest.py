from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.worlds.kubernetes_api import Api
from zerowake_shared.kubernetes.cluster import Cluster


@pytest.fixture
def api() -> Api:
    """Kubernetes' API, with nothing in it."""
    return Api()


@pytest.fixture
async def cluster(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    """A client of it."""
    async with api.connected(tmp_path, monkeypatch) as cluster:
        yield cluster
