"""Which GPUs a container got: by the kubelet's word, over real gRPC, and by the device files of a process that has a /dev of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from restore_agent.drivers.cuda import NodeGpu
from restore_agent.kubernetes.calling_pod import CallingPod
from restore_agent.kubernetes.cri import Described
from restore_agent.kubernetes.pod import Pod
from restore_agent.kubernetes.pod_gpus import PodGpus, UnsuitableGpus
from restore_agent.kubernetes.pod_resources import Device, PodResources
from restore_agent.places.container_error import ContainerError
from restore_agent.places.placeholder import Placeholder
from tests.worlds.pod_resources import KubeletDevices

pytestmark = pytest.mark.usefixtures("needs_criu")  # root, for the /dev of its own
# In CUDA's order, which is neither that of the names nor that of the files.
GPUS = (NodeGpu("GPU-c", index=0, minor=1), NodeGpu("GPU-a", index=1, minor=0), NodeGpu("GPU-b", index=2, minor=2))
DRIVER = "gpu.nvidia.com"
DEVICES = {"limits": {"nvidia.com/gpu": 1}}
CLAIM = {"claims": [{"name": "gpus"}]}


class Slices:
    """What drivers of claims have published."""

    def __init__(self) -> None:
        self.published: dict[str, str] = {}

    async def uuids(self, devices: Any) -> dict[Device, str]:
        return {each: self.published[each.name] for each in devices if each.pool and each.name in self.published}


@pytest.fixture
def slices() -> Slices:
    return Slices()


@pytest.fixture
async def gpus(short_folder: Path, slices: Slices) -> AsyncIterator[PodGpus]:
    given: Any = slices
    async with PodResources.connected(short_folder) as resources:
        yield PodGpus(resources, given, GPUS)


Container = Callable[..., CallingPod]


@pytest.fixture
def container() -> Iterator[Container]:
    """Makes a container `engine` of the pod team/one: a process whose /dev has these device files, and this environment."""
    with contextlib.ExitStack() as stack:

        def made(resources: dict[str, Any], *minors: int, also: str = "true", **env: str) -> CallingPod:
            files = " && ".join(["mount -t tmpfs tmpfs /dev", *(f"mknod /dev/nvidia{minor} c 1 3" for minor in minors), also])
            process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", f"{files} && echo made && exec sleep 1000"],
                env={"PATH": os.environ["PATH"], **env},
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout and process.stdout.readline() == "made\n"
            pod = {"metadata": {"name": "one", "namespace": "team"}, "spec": {"containers": [{"name": "engine", "resources": resources}]}}
            placeholder = Placeholder(None, process.pid)
            stack.callback(placeholder.close)
            about = Described("id", "engine", process.pid, "sha256:0123", "one", "u", "team", ("10.1.2.3",))
            return CallingPod(placeholder, about, msgspec.convert(pod, Pod))

        yield made


async def test_the_one_that_a_device_plugin_gave(kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container) -> None:
    kubelet_devices.gives("team", "one", "GPU-b")
    kubelet_devices.gives("team", "two", "GPU-a")
    assert await gpus.of(container(DEVICES, 2)) == ("GPU-b",)


async def test_several_are_in_cuda_s_order(kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container) -> None:
    kubelet_devices.gives("team", "one", "GPU-a", "GPU-b", "GPU-c")
    assert await gpus.of(container(DEVICES, 0, 1, 2)) == ("GPU-c", "GPU-a", "GPU-b")


async def test_a_claim_s_is_the_one_of_its_driver_s_slice(
    kubelet_devices: KubeletDevices, gpus: PodGpus, slices: Slices, container: Container
) -> None:
    kubelet_devices.grants("team", "one", "gpu-0", cdi=("k8s.gpu.nvidia.com/claim=1-gpu-0",))
    slices.published = {"gpu-0": "GPU-a"}
    assert await gpus.of(container(CLAIM, 0)) == ("GPU-a",)


@pytest.mark.parametrize("cdi", ["nvidia.com/gpu=1", "nvidia.com/gpu=GPU-a"])
async def test_a_claim_s_is_the_one_of_its_cdi_name_where_no_slice_says_it(
    kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container, cdi: str
) -> None:
    kubelet_devices.grants("team", "one", "gpu-0", cdi=(cdi,))
    assert await gpus.of(container(CLAIM, 0)) == ("GPU-a",)
    with pytest.raises(UnsuitableGpus, match=r"GPU-c \(/dev/nvidia1\) beside what the kubelet gave it"):
        await gpus.of(container(CLAIM, 0, 1))


async def test_without_the_kubelet_s_word_the_device_files_say_it(
    kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container, caplog: pytest.LogCaptureFixture
) -> None:
    kubelet_devices.grants("team", "one", "something", cdi=("vendor.example/claim=1",))
    assert await gpus.of(container(CLAIM, 0)) == ("GPU-a",), "a driver that says nothing"
    kubelet_devices.devices.clear()
    assert await gpus.of(container(DEVICES, 0)) == ("GPU-a",), "it was given none"
    assert not caplog.records
    kubelet_devices.refuses.append(grpc.StatusCode.PERMISSION_DENIED)
    assert await gpus.of(container(DEVICES, 0)) == ("GPU-a",), "it refuses"
    assert "which GPUs pod team/one was given is taken from its container's device files" in caplog.text


async def test_a_pod_that_wants_no_device_costs_no_question(kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container) -> None:
    assert await gpus.of(container({"limits": {"memory": "1Gi"}})) == ()
    assert kubelet_devices.asked == 0


async def test_other_devices_are_no_gpus(kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container) -> None:
    kubelet_devices.gives("team", "one", "mlx5_0", resource="rdma/hca")
    decoys = ("mknod /dev/nvidiactl c 1 3", "mknod /dev/nvidia7 c 1 3", "ln -s nvidia7 /dev/nvidia2", "touch /dev/nvidia1")
    assert await gpus.of(container(DEVICES, also=" && ".join(decoys))) == ()


async def test_a_gpu_whose_device_file_is_missing_is_refused_before_anything_is_restored(
    kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container
) -> None:
    kubelet_devices.gives("team", "one", "GPU-a")
    with pytest.raises(UnsuitableGpus, match=r"gave it GPU-a \(/dev/nvidia0\), whose device file is not in its container"):
        await gpus.of(container(DEVICES, 1))


async def test_a_container_that_sees_others_gpus_is_refused(kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container) -> None:
    kubelet_devices.gives("team", "one", "GPU-a")
    with pytest.raises(UnsuitableGpus, match=r"sees GPU-c \(/dev/nvidia1\), GPU-b \(/dev/nvidia2\) beside .*NVIDIA_VISIBLE_DEVICES=void"):
        await gpus.of(container(DEVICES, 0, 1, 2))


@pytest.mark.parametrize("name", ["MIG-1f0e", "nvidia0/gi1"])
async def test_a_slice_is_refused(kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container, name: str) -> None:
    kubelet_devices.gives("team", "one", name, resource="nvidia.com/mig-1g.5gb")
    with pytest.raises(UnsuitableGpus, match=rf"a slice of a GPU \(MIG: {name}\), .*have it ask for whole GPUs"):
        await gpus.of(container(DEVICES, 0))


async def test_a_claimed_slice_is_refused(kubelet_devices: KubeletDevices, gpus: PodGpus, slices: Slices, container: Container) -> None:
    kubelet_devices.grants("team", "one", "gpu-0-mig-1")
    slices.published = {"gpu-0-mig-1": "MIG-1f0e"}
    with pytest.raises(UnsuitableGpus, match=r"MIG: MIG-1f0e"):
        await gpus.of(container(CLAIM, 0))


async def test_one_that_is_shared_by_mps_is_refused_and_one_that_is_shared_in_time_is_not(
    kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container
) -> None:
    kubelet_devices.gives("team", "one", "GPU-a::1")
    assert await gpus.of(container(DEVICES, 0)) == ("GPU-a",)
    with pytest.raises(UnsuitableGpus, match=r"by MPS \(CUDA_MPS_PIPE_DIRECTORY=/mps/pipe\)"):
        await gpus.of(container(DEVICES, 0, CUDA_MPS_PIPE_DIRECTORY="/mps/pipe"))
    assert await gpus.of(container({}, CUDA_MPS_PIPE_DIRECTORY="/mps/pipe")) == (), "it has no GPU"


async def test_a_container_that_has_ended_says_so(kubelet_devices: KubeletDevices, gpus: PodGpus, container: Container) -> None:
    ended = container({})
    os.kill(ended.about.pid, 9)
    await ended.placeholder.ended
    with pytest.raises(ContainerError, match=r"/dev of the container cannot be read"):
        await gpus.of(ended)


async def test_what_all_pods_hold_is_known_by_uuid_and_what_is_no_gpu_by_its_own_name(
    kubelet_devices: KubeletDevices, gpus: PodGpus, slices: Slices
) -> None:
    kubelet_devices.gives("team", "one", "GPU-a::1", "GPU-a::2")
    kubelet_devices.gives("team", "two", "nvidia1")
    kubelet_devices.gives("team", "two", "host", container="sidecar")
    kubelet_devices.grants("other", "one", "gpu-2")
    kubelet_devices.grants("other", "two", "nic-0")
    slices.published = {"gpu-2": "GPU-b"}
    assert await gpus.held() == {
        ("team", "one"): {"GPU-a"},
        ("team", "two"): {"GPU-c", "host"},
        ("other", "one"): {"GPU-b"},
        ("other", "two"): {"nic-0"},
    }
