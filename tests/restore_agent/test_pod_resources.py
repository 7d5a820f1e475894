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
async def kubelet(short_folder: Path) -> AsyncIterator[KubeletDevices]:
    devices = KubeletDevices()
    async with devices.serve(short_folder):
        yield devices


@pytest.fixture
async def resources(short_folder: Path) -> AsyncIterator[PodResources]:
    async with PodResources.connected(short_folder) as resources:
        yield resources


async def test_devices_of_plugins_and_of_claims(kubelet: KubeletDevices, resources: PodResources) -> None:
    kubelet.gives("team", "one", "GPU-a", "GPU-b")
    kubelet.grants("team", "two", "gpu-0", cdi=("k8s.gpu.nvidia.com/claim=1-gpu-0",))
    kubelet.gives("team", "none")
    assert await resources.given() == {
        Holder("team", "one", "engine"): [Device("nvidia.com/gpu", "GPU-a"), Device("nvidia.com/gpu", "GPU-b")],
        Holder("team", "two", "engine"): [Device("gpu.nvidia.com", "gpu-0", "node", ("k8s.gpu.nvidia.com/claim=1-gpu-0",))],
    }


async def test_what_is_refused_since_too_much_was_asked_is_asked_again(kubelet: KubeletDevices, resources: PodResources) -> None:
    kubelet.gives("team", "one", "GPU-a")
    kubelet.refuses += [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
    assert len(await resources.given()) == 1
    assert kubelet.asked == 4


async def test_whoever_is_denied_is_told(kubelet: KubeletDevices, resources: PodResources, short_folder: Path) -> None:
    kubelet.refuses.append(grpc.StatusCode.PERMISSION_DENIED)
    with pytest.raises(KubeletError, match=rf"^the kubelet cannot be asked at {short_folder / SOCKET}: no$"):
        await resources.given()
    assert await resources.given() == {}, "and may ask again"


async def test_a_slow_one_is_not_waited_for(kubelet: KubeletDevices, resources: PodResources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_resources, "_ANSWER_SECONDS", 0.05)
    kubelet.answers.clear()
    with pytest.raises(KubeletError, match=r"did not answer at .* within"):
        await resources.given()


async def test_where_there_is_none_its_folder_is_asked_for(resources: PodResources, short_folder: Path) -> None:
    with pytest.raises(KubeletError, match=rf"does not listen at {short_folder / SOCKET}; .*--kubelet"):
        await resources.given()


async def test_one_that_is_started_anew_is_found_again(resources: PodResources, short_folder: Path) -> None:
    """Also after it was away for so long that gRPC looks for it only now and then."""
    kubelet = KubeletDevices()
    kubelet.gives("team", "one", "GPU-a")
    async with kubelet.serve(short_folder):
        assert len(await resources.given()) == 1
    for _ in range(20):
        with contextlib.suppress(KubeletError):
            await resources.given()
            pytest.fail("nobody is there to answer")
    async with kubelet.serve(short_folder), asyncio.timeout(30):
        while True:
            with contextlib.suppress(KubeletError):
                assert len(await resources.given()) == 1
                return
