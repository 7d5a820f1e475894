"""Which devices the kubelet has given: asked over real gRPC, also where there is no kubelet, a slow one, or one that was started anew."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from restore_agent.kubernetes import pod_resources
from restore_agent.kubernetes.pod_resources import SOCKET, Device, Holder, KubeletError, PodResources
from tests.worlds.pod_resources import KubeletDevices


@pytest.fixture
async def resources(short_folder: Path) -> AsyncIterator[PodResources]:
    async with PodResources.connected(short_folder) as resources:
        yield resources


async def test_devices_of_plugins_and_of_claims(kubelet_devices: KubeletDevices, resources: PodResources) -> None:
    kubelet_devices.gives("team", "one", "GPU-a", "GPU-b")
    kubelet_devices.grants("team", "two", "gpu-0", cdi=("k8s.gpu.nvidia.com/claim=1-gpu-0",))
    kubelet_devices.gives("team", "none")
    assert await resources.given() == {
        Holder("team", "one", "engine"): [Device("nvidia.com/gpu", "GPU-a"), Device("nvidia.com/gpu", "GPU-b")],
        Holder("team", "two", "engine"): [Device("gpu.nvidia.com", "gpu-0", "node", ("k8s.gpu.nvidia.com/claim=1-gpu-0",))],
    }


async def test_what_is_refused_since_too_much_was_asked_is_asked_again(kubelet_devices: KubeletDevices, resources: PodResources) -> None:
    kubelet_devices.gives("team", "one", "GPU-a")
    kubelet_devices.refuses += [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
    assert len(await resources.given()) == 1
    assert kubelet_devices.asked == 4


async def test_whoever_is_denied_is_told(kubelet_devices: KubeletDevices, resources: PodResources, short_folder: Path) -> None:
    kubelet_devices.refuses.append(grpc.StatusCode.PERMISSION_DENIED)
    with pytest.raises(KubeletError, match=rf"^the kubelet cannot be asked at {short_folder / SOCKET}: no$"):
        await resources.given()
    assert await resources.given() == {}, "and may ask again"


async def test_a_slow_one_is_not_waited_for(
    kubelet_devices: KubeletDevices, resources: PodResources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_resources, "_ANSWER_SECONDS", 0.05)
    kubelet_devices.answers.clear()
    with pytest.raises(KubeletError, match=r"did not answer at .* within"):
        await resources.given()


async def test_where_there_is_none_its_folder_is_asked_for(resources: PodResources, short_folder: Path) -> None:
    with pytest.raises(KubeletError, match=rf"does not listen at {short_folder / SOCKET}; .*--kubelet"):
        await resources.given()


async def test_one_that_is_started_anew_is_found_again(resources: PodResources, short_folder: Path) -> None:
    """Also after it was away for so long that gRPC looks for it only now and then."""
    kubelet_devices = KubeletDevices()
    kubelet_devices.gives("team", "one", "GPU-a")
    async with kubelet_devices.serve(short_folder):
        assert len(await resources.given()) == 1
    for _ in range(20):
        with contextlib.suppress(KubeletError):
            await resources.given()
            pytest.fail("nobody is there to answer")
    async with kubelet_devices.serve(short_folder), asyncio.timeout(30):
        while True:
            with contextlib.suppress(KubeletError):
                assert len(await resources.given()) == 1
                return
