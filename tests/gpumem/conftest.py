from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress

import pytest
from zerowake_proto import gpumem_pb2 as pb

from gpumem.client import Client
from gpumem.wire.blocking_connection import BlockingConnection
from gpumem.wire.errors import NotFound
from tests.worlds.gpumem_server import MIB, Served, Weights, make_weights, served, until


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("weights") / "weights.bin", 21 * MIB + 12345)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that the tests of a file share; each leaves it as it was."""
    with served(tmp_path_factory.mktemp("server"), reserve=192 * MIB, arena=64 * MIB) as found:
        yield found


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.socket, label="test") as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A shared server has no lease and no region left after each test, and holds all that it should."""
    yield
    if "server" in request.fixturenames:
        clean(request.getfixturevalue("server"))


def clean(server: Served) -> None:
    until(lambda: not server.status().leases and not server.status().fills)  # a fill that was stopped waits for its moves
    connection = BlockingConnection(server.socket, "cleaner")
    for region in server.status().regions:
        with suppress(NotFound):  # one whose writer has just ended goes by itself
            connection.ask(pb.Request(evict=pb.Evict(region=pb.RegionRef(device=region.device, id=region.id))))
    connection.close()
    until(lambda: server.host.free_bytes == server.host.wanted_bytes)


@pytest.fixture
def no_garbage() -> None:
    """For tests that count descriptors: earlier ones may have left some to the garbage collector."""
    gc.collect()
