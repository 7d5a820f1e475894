from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from restore_agent.sequences.node import Node
from restore_agent.service import metrics
from restore_agent.snapshots.store import Store
from restore_agent.transfer.directory import Directory
from tests.worlds.agent import Agent, copy_state, engine, running
from tests.worlds.container_runtime import ContainerRuntime
from tests.worlds.containers import Callers, answering, imaged
from tests.worlds.gpumem_server import MIB, Served, served
from tests.worlds.kubelet import Kubelet
from tests.worlds.kubernetes_api import Api
from tests.worlds.leftovers import huge_pages_are_back, left_behind
from tests.worlds.needs import missing_for_criu
from tests.worlds.pod_resources import KubeletDevices


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if missing := missing_for_criu():
        for item in items:
            if Path(__file__).parent in item.path.parents and "needs_criu" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For sockets: the path of one has 107 bytes at most, and a test's own folder takes most of them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Directory]:
    """A store in a folder of the test's own, empty."""
    (tmp_path / "remote").mkdir()
    remote = Directory(tmp_path / "remote")
    yield remote
    await remote.close()


@pytest.fixture(scope="session")
def needs_criu() -> None:
    """Asked for by every test that restores; the hook above says what is missing."""


@pytest.fixture(scope="session")
def needs_runc(needs_criu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if shutil.which("runc") is None:
        pytest.fail("these tests make containers by runc: `make test` installs it, or apt-get install runc iproute2")
    with imaged(tmp_path_factory.mktemp("image")):
        yield


@pytest.fixture
async def callers(tmp_path: Path) -> AsyncIterator[Callers]:
    """The placeholders of the test's containers."""
    async with answering(tmp_path / "bin") as callers:
        yield callers


@pytest.fixture(scope="session")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the snapshot's server maps."""
    path = tmp_path_factory.mktemp("files") / "weights.bin"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory, mapped: Path, needs_criu: None) -> Path:
    """A state folder with one snapshot, `small`, of a server with a child process. Tests work on copies."""
    state = tmp_path_factory.mktemp("captured") / "state"

    async def capture() -> None:
        async with running(state) as agent:
            await agent.snapshot("small", engine(mapped, 8, "--child"))

    asyncio.run(capture())
    return state


@pytest.fixture(scope="module")
def lender(tmp_path_factory: pytest.TempPathFactory, needs_criu: None) -> Iterator[Served]:
    """gpumem, which the engines know by one socket for as long as they live."""
    with served(tmp_path_factory.mktemp("gpumem"), 256 * MIB) as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty one, below `state` of the test's folder."""
    with contextlib.closing(Store(tmp_path / "state")) as store:
        yield store


@pytest.fixture
def state(captured: Path, tmp_path: Path) -> Path:
    return copy_state(captured, tmp_path / "state")


@pytest.fixture
async def agent(state: Path) -> AsyncIterator[Agent]:
    """A fresh agent over a copy of the snapshot; afterwards nothing of it may be left."""
    async with running(state) as started:
        yield started
    assert left_behind(state) == []
    await huge_pages_are_back()
    assert list((state / "tmp").iterdir()) == []
    shutil.rmtree(state)


@pytest.fixture
async def node(tmp_path: Path, short_folder: Path) -> AsyncIterator[Node]:
    """With nothing on it, in the test's own process; `gpumem.sock` of the short folder is where its gpumem would be."""
    async with Node.open("node", tmp_path / "state", tmp_path / "memory", short_folder / "gpumem.sock", metrics) as node:
        yield node


@pytest.fixture
async def kubelet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kubelet]:
    """Pods for an agent in the test's own process; KUBECONFIG is of their API."""
    api, runtime = Api(), ContainerRuntime()
    async with api.serve(tmp_path) as config, runtime.serve(tmp_path / "cri.sock"):
        monkeypatch.setenv("KUBECONFIG", str(config))
        yield Kubelet(api, runtime, tmp_path)


@pytest.fixture
async def kubelet_devices(short_folder: Path) -> AsyncIterator[KubeletDevices]:
    """What a kubelet says of its devices, at its socket below the short folder."""
    devices = KubeletDevices()
    async with devices.serve(short_folder):
        yield devices
