"""Real engines, each started once."""

from collections.abc import Iterator

import pytest

from tests.worlds.demo_engine import Served, started


@pytest.fixture(scope="session")
def chat() -> Iterator[Served]:
    with started("chat.py") as served:
        yield served


@pytest.fixture(scope="session")
def embeddings() -> Iterator[Served]:
    with started("embeddings.py") as served:
        yield served
