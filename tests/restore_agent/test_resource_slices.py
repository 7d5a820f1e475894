"""Which GPU a claim's device is, by what its driver has published; over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from restore_agent.kubernetes.pod_resources import Device
from restore_agent.kubernetes.resource_slices import ResourceSlices
from tests.worlds.kubernetes_api import Api
from zerowake_shared.kubernetes.cluster import Cluster

DRIVER = "gpu.nvidia.com"


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.seconds


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    api = Api()
    async with api.serve(tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
        yield api


@pytest.fixture
async def slices(api: Api, time: Time) -> AsyncIterator[ResourceSlices]:
    async with Cluster.connect(reporter="test", instance="test") as cluster:
        yield ResourceSlices(cluster, "node", time)


async def publish(api: Api, name: str, generation: int = 1, **devices: dict[str, Any]) -> None:
    spec = {
        "driver": DRIVER,
        "nodeName": "node",
        "pool": {"name": "node", "generation": generation, "resourceSliceCount": 1},
        "devices": [{"name": device.replace("_", "-"), "attributes": attributes} for device, attributes in devices.items()],
    }
    await api.put("resourceslices", {"metadata": {"name": name}, "spec": spec})


def claimed(name: str) -> Device:
    return Device(DRIVER, name, "node")


def listed(api: Api) -> list[str]:
    return [path for _, path in api.requests if "resourceslices" in path]


async def test_a_device_is_known_by_its_driver_s_attribute(api: Api, slices: ResourceSlices) -> None:
    await publish(api, "one", gpu_0={"uuid": {"string": "GPU-a"}, "type": {"string": "gpu"}, "index": {"int": 0}})
    await publish(api, "two", gpu_1={"gpu.nvidia.com/uuid": {"string": "GPU-b"}}, nic_0={"speed": {"int": 9}})
    wanted = [claimed("gpu-0"), claimed("gpu-1"), claimed("nic-0"), claimed("gone"), Device("nvidia.com/gpu", "gpu-0")]
    assert await slices.uuids(wanted) == {claimed("gpu-0"): "GPU-a", claimed("gpu-1"): "GPU-b"}
    assert "fieldSelector=spec.nodeName%3Dnode" in listed(api)[0], "of this node alone"


async def test_a_cluster_without_claims_is_not_asked(api: Api, slices: ResourceSlices) -> None:
    assert await slices.uuids([Device("nvidia.com/gpu", "GPU-a")]) == {}
    assert listed(api) == []


async def test_it_is_read_once_a_minute_or_when_a_device_is_not_known(api: Api, slices: ResourceSlices, time: Time) -> None:
    await publish(api, "one", gpu_0={"uuid": {"string": "GPU-a"}})
    for _ in range(3):
        await slices.uuids([claimed("gpu-0")])
    assert len(listed(api)) == 1
    await publish(api, "two", gpu_1={"uuid": {"string": "GPU-b"}})
    assert await slices.uuids([claimed("gpu-1")]) == {}, "it was read just now"
    time.seconds += 2
    assert await slices.uuids([claimed("gpu-1")]) == {claimed("gpu-1"): "GPU-b"}
    time.seconds += 61
    await slices.uuids([claimed("gpu-0")])
    assert len(listed(api)) == 3


async def test_of_a_pool_that_is_published_anew_the_newest_generation_counts(api: Api, slices: ResourceSlices) -> None:
    await publish(api, "new", 2, gpu_0={"uuid": {"string": "GPU-b"}})
    await publish(api, "old", 1, gpu_0={"uuid": {"string": "GPU-a"}}, gpu_1={"uuid": {"string": "GPU-c"}})
    assert await slices.uuids([claimed("gpu-0"), claimed("gpu-1")]) == {claimed("gpu-0"): "GPU-b"}


async def test_many_come_in_pages(api: Api, slices: ResourceSlices) -> None:
    api.page = 2
    for number in range(5):
        await publish(api, f"slice-{number}", **{f"gpu_{number}": {"uuid": {"string": f"GPU-{number}"}}})
    assert len(await slices.uuids(claimed(f"gpu-{number}") for number in range(5))) == 5


@pytest.mark.parametrize("status", [403, 404, 500])
async def test_what_is_known_outlives_an_api_server_that_refuses(
    api: Api, slices: ResourceSlices, time: Time, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    await publish(api, "one", gpu_0={"uuid": {"string": "GPU-a"}})
    await slices.uuids([claimed("gpu-0")])
    time.seconds += 61
    api.refuse.append(("GET", "resourceslices", status, "not for you"))
    assert await slices.uuids([claimed("gpu-0")]) == {claimed("gpu-0"): "GPU-a"}
    assert "not for you" in caplog.text
