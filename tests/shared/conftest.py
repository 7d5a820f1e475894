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
    async with api.serve(tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
        async with Cluster.connect(reporter="zerowake.dev/test", instance="test") as cluster:
            yield cluster
