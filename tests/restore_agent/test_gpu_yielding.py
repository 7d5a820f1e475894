"""A device that the kubelet gives to somebody else's pod: a real gpumem gives its memory back, and holds it again afterwards.

The kubelet's pod-resources API is a gRPC server of the test's own; the device is the host's memory. What a claim's device is called, and
which GPU that is, is test_pod_gpus.py's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from restore_agent.kubernetes.gpu_yielding import GpuYielding
from restore_agent.kubernetes.pod import Pod
from restore_agent.kubernetes.pod_gpus import PodGpus
from restore_agent.kubernetes.pod_resources import Device, PodResources
from tests.worlds.gpumem_server import Served, served
from tests.worlds.pod_resources import KubeletDevices
from tests.worlds.waiting import until

RESERVE = 64 << 20


class Pods:
    """The node's pods, as the API server tells of them."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self._heard: list[Callable[[Pod, bool], None]] = []

    def on_change(self, heard: Callable[[Pod, bool], None]) -> None:
        self._heard.append(heard)

    def comes(self, name: str, labels: dict[str, str], gpumem: str = "", phase: str = "Pending", *, claims: bool = False) -> None:
        limits = {"resources": {"claims": [{"name": "gpu"}]} if claims else {"limits": {"nvidia.com/gpu": "1", "memory": "1Gi"}}}
        made = {
            "metadata": {"name": name, "namespace": "other", "uid": name, "labels": labels, "annotations": {"zerowake.dev/gpumem": gpumem}},
            "spec": {"containers": [{"name": "engine", **limits}]},
            "status": {"phase": phase},
        }
        self.pods[name] = msgspec.convert(made, Pod)
        self._tell(self.pods[name], False)

    def goes(self, name: str) -> None:
        self._tell(self.pods.pop(name), True)

    def _tell(self, pod: Pod, gone: bool) -> None:
        for heard in self._heard:
            heard(pod, gone)


@pytest.fixture
def gpumem(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path / "gpumem", RESERVE) as server:
        yield server


class Slices:
    """A driver of claims whose device is the host's memory."""

    async def uuids(self, devices: Any) -> dict[Device, str]:
        return {each: "host" for each in devices if each.pool}


@pytest.fixture
async def gpus(short_folder: Path) -> AsyncIterator[PodGpus]:
    slices: Any = Slices()
    async with PodResources.connected(short_folder) as resources:
        yield PodGpus(resources, slices, ())


@contextlib.asynccontextmanager
async def yielding(pods: Pods, gpus: PodGpus, gpumem: Served, folder: Path) -> AsyncIterator[list[set[str]]]:
    """Yields what was told of GPUs that others have, each time."""
    watched: Any = pods
    told: list[set[str]] = []

    async def others_have(gpus: Collection[str]) -> None:
        told.append(set(gpus))

    async with GpuYielding.watching(watched, gpus, gpumem.socket, folder, others_have):
        yield told


def wanted(gpumem: Served) -> int:
    return gpumem.host.wanted_bytes


async def test_a_device_of_another_s_pod_is_given_back_until_that_pod_goes(
    kubelet_devices: KubeletDevices, gpus: PodGpus, gpumem: Served, tmp_path: Path
) -> None:
    pods = Pods()
    before = wanted(gpumem)
    assert before >= RESERVE
    async with yielding(pods, gpus, gpumem, tmp_path) as told:
        pods.comes("stranger", {})
        await until(lambda: kubelet_devices.asked > 2)
        assert wanted(gpumem) == before, "it has no devices yet"
        assert told[-1] == set()
        kubelet_devices.gives("other", "stranger", "host")
        await until(lambda: wanted(gpumem) == 0)
        assert told[-1] == {"host"}, "and whoever parks engines there hears of it"
        note, earlier = tmp_path / "yielded.json", tmp_path / "earlier"
        await until(lambda: json.loads(note.read_text()) == {"host": before})
        earlier.hardlink_to(note)
        kubelet_devices.devices.clear()
        pods.goes("stranger")
        await until(lambda: wanted(gpumem) == before)
        await until(lambda: json.loads(note.read_text()) == {})
        assert json.loads(earlier.read_text()) == {"host": before}, "a note is put in the place of the one before, never written into it"
        assert told[-1] == set()


@pytest.mark.parametrize("torn", ["", '{"host": 10', "[1]", '{"host": "much"}'])
async def test_a_note_that_cannot_be_read_keeps_nothing_from_starting(
    kubelet_devices: KubeletDevices, gpus: PodGpus, gpumem: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: str
) -> None:
    (tmp_path / "yielded.json").write_text(torn)
    pods = Pods()
    before = wanted(gpumem)
    kubelet_devices.gives("other", "stranger", "host")
    async with yielding(pods, gpus, gpumem, tmp_path):
        pods.comes("stranger", {})
        await until(lambda: wanted(gpumem) == 0)
        await until(lambda: json.loads((tmp_path / "yielded.json").read_text()) == {"host": before})
    assert "yielded.json cannot be read" in caplog.text


@pytest.mark.parametrize("label", ["zerowake.dev/snapshot", "zerowake.dev/capture"])
async def test_a_pod_of_ours_lends_from_gpumem_and_takes_nothing(
    kubelet_devices: KubeletDevices, gpus: PodGpus, gpumem: Served, tmp_path: Path, label: str
) -> None:
    pods = Pods()
    before = wanted(gpumem)
    kubelet_devices.gives("other", "ours", "host")
    pods.comes("ours", {label: "chat"}, gpumem="true")
    async with yielding(pods, gpus, gpumem, tmp_path):
        await until(lambda: kubelet_devices.asked)
        pods.comes("stranger", {})
        await until(lambda: kubelet_devices.asked > 3)
        assert wanted(gpumem) == before


async def test_one_of_ours_that_nothing_is_lent_to_takes_it_as_any_other(
    kubelet_devices: KubeletDevices, gpus: PodGpus, gpumem: Served, tmp_path: Path
) -> None:
    """The webhook left it as it is; or its engine is started cold, which is said of it later."""
    pods = Pods()
    before = wanted(gpumem)
    kubelet_devices.gives("other", "ours", "host")
    pods.comes("ours", {"zerowake.dev/snapshot": "chat"}, gpumem="true")
    async with yielding(pods, gpus, gpumem, tmp_path):
        await until(lambda: kubelet_devices.asked)
        assert wanted(gpumem) == before
        pods.comes("ours", {"zerowake.dev/snapshot": "chat"}, gpumem="false")
        await until(lambda: wanted(gpumem) == 0)
        kubelet_devices.devices.clear()
        pods.goes("ours")
        await until(lambda: wanted(gpumem) == before)


async def test_a_claim_is_looked_for_until_its_pod_runs(
    kubelet_devices: KubeletDevices, gpus: PodGpus, gpumem: Served, tmp_path: Path
) -> None:
    """It is prepared after the pod was given its other devices."""
    pods = Pods()
    before = wanted(gpumem)
    kubelet_devices.gives("other", "stranger", "mlx5_0", resource="rdma/hca")
    async with yielding(pods, gpus, gpumem, tmp_path) as told:
        pods.comes("stranger", {}, claims=True)
        await until(lambda: len(told) > 5)
        assert wanted(gpumem) == before
        kubelet_devices.grants("other", "stranger", "gpu-0")
        await until(lambda: wanted(gpumem) == 0)
        pods.comes("stranger", {}, claims=True, phase="Running")
        await until(lambda: json.loads((tmp_path / "yielded.json").read_text()) == {"host": before})
        kubelet_devices.devices.clear()
        pods.goes("stranger")
        await until(lambda: wanted(gpumem) == before)


async def test_a_kubelet_that_is_away_for_a_while_is_asked_again(
    gpus: PodGpus, gpumem: Served, tmp_path: Path, short_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "zerowake.agent")
    pods, kubelet_devices = Pods(), KubeletDevices()
    kubelet_devices.gives("other", "stranger", "host")
    async with yielding(pods, gpus, gpumem, tmp_path):
        pods.comes("stranger", {})
        await until(lambda: "GPUs are not yielded to other pods: the kubelet does not listen" in caplog.text)
        async with kubelet_devices.serve(short_folder):
            pods.goes("stranger")  # whatever is heard makes it look again
            await until(lambda: wanted(gpumem) == 0)


async def test_a_gpu_that_is_shared_in_time_is_the_gpu(
    kubelet_devices: KubeletDevices, gpus: PodGpus, gpumem: Served, tmp_path: Path
) -> None:
    pods = Pods()
    kubelet_devices.gives("other", "stranger", "host::3")
    async with yielding(pods, gpus, gpumem, tmp_path):
        pods.comes("stranger", {})
        await until(lambda: wanted(gpumem) == 0)


async def test_an_agent_that_comes_anew_knows_what_to_hold_again(
    kubelet_devices: KubeletDevices, gpus: PodGpus, gpumem: Served, tmp_path: Path
) -> None:
    pods = Pods()
    before = wanted(gpumem)
    kubelet_devices.gives("other", "stranger", "host")
    async with yielding(pods, gpus, gpumem, tmp_path):
        pods.comes("stranger", {})
        await until(lambda: wanted(gpumem) == 0)
    pods.goes("stranger")
    kubelet_devices.devices.clear()
    async with yielding(pods, gpus, gpumem, tmp_path):
        await until(lambda: wanted(gpumem) == before)
