"""What a GPU is called by plugins, drivers and CDI."""

from __future__ import annotations

import pytest

from restore_agent.drivers.cuda import NodeGpu
from restore_agent.kubernetes.device_names import gpu_called, is_slice, shared_by

# Of the PCI bus's order and the device files' none needs to be CUDA's.
GPUS = (NodeGpu("GPU-a", index=1, minor=3), NodeGpu("GPU-b", index=0, minor=2))


@pytest.mark.parametrize(
    ("name", "uuid"),
    [
        ("GPU-a", "GPU-a"),
        ("GPU-b::7", "GPU-b"),
        ("nvidia3", "GPU-a"),
        ("nvidia2/vgpu0", "GPU-b"),
        ("nvidia.com/gpu=0", "GPU-b"),
        ("nvidia.com/gpu=GPU-a", "GPU-a"),
        ("k8s.gpu.nvidia.com/device=nvidia2", "GPU-b"),
        ("GPU-c", ""),
        ("nvidia0", ""),
        ("0", ""),  # a plugin's own number is not known to be the bus's
        ("nvidia.com/gpu=2", ""),
        ("k8s.gpu.nvidia.com/claim=2f6e-gpu-0", ""),
        ("", ""),
    ],
)
def test_a_gpu_is_known_by_each_of_its_names(name: str, uuid: str) -> None:
    assert gpu_called(name, GPUS) == uuid


@pytest.mark.parametrize(
    "name", ["MIG-1f0e", "MIG-1f0e::2", "nvidia0/gi1", "nvidia0/gi1/vgpu2", "nvidia.com/gpu=0:1", "nvidia.com/gpu=MIG-1f0e"]
)
def test_a_slice_is_no_gpu(name: str) -> None:
    assert is_slice(name)
    assert gpu_called(name, GPUS) == ""


@pytest.mark.parametrize("name", ["GPU-a", "GPU-a::1", "nvidia0", "nvidia0/vgpu1", "nvidia.com/gpu=0", "mlx5_0", ""])
def test_a_whole_device_is_no_slice(name: str) -> None:
    assert not is_slice(name)


def test_who_shares_a_device_in_time_has_that_device() -> None:
    assert (shared_by("host::3"), shared_by("host")) == ("host", "host")
