"""Which devices the kubelet has given to which container, by its pod-resources API: those of device plugins, and those of claims (DRA).

The API can be asked and tells nothing by itself. It says the same to everybody who can open its socket, and is refused to whoever asks more
than a hundred times a second: such an answer is waited out. A kubelet that is started anew makes its socket anew: the next call finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc
from zerowake_proto import podresources_pb2, podresources_pb2_grpc

from restore_agent.errors import AgentError

SOCKET = Path("pod-resources/kubelet.sock")  # in the kubelet's folder
_ANSWER_SECONDS = 2.0
_BUSY_SECONDS = 0.02  # after a refusal of the API's own limiter
# gRPC would wait for up to two minutes before it looks again for a kubelet that was away.
_OPTIONS = [("grpc.default_authority", "localhost"), ("grpc.min_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]


class KubeletError(AgentError):
    """The kubelet cannot be asked which devices it has given."""


class Holder(NamedTuple):
    """A container that was given devices."""

    namespace: str
    pod: str
    container: str


@dataclass(frozen=True)
class Device:
    """One that was given. `source`: the resource of a device plugin, or the driver of a claim; `name`: as that one calls it; `pool`: of a
    claim alone, for which `cdi` are the device's names for the container runtime."""

    source: str
    name: str
    pool: str = ""
    cdi: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.source} {self.name}"


class PodResources:
    """Use `async with PodResources.connected(kubelet)`."""

    def __init__(self, channel: grpc.aio.Channel, socket: Path) -> None:
        self._kubelet = podresources_pb2_grpc.PodResourcesListerStub(channel)
        self._socket = socket

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, kubelet: Path) -> AsyncIterator[PodResources]:
        """`kubelet`: its folder. Nobody is asked yet."""
        socket = kubelet / SOCKET
        async with grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS) as channel:
            yield cls(channel, socket)

    async def given(self) -> Mapping[Holder, list[Device]]:
        """All that are given now, to whatever pod of the node; it says nothing of containers that have none. Raises KubeletError."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                answer = await self._asked()
        except TimeoutError:
            raise KubeletError(f"the kubelet did not answer at {self._socket} within {_ANSWER_SECONDS:.0f} s") from None
        except grpc.aio.AioRpcError as error:
            raise KubeletError(self._why(error)) from None
        found: dict[Holder, list[Device]] = {}
        for pod in answer.pod_resources:
            for container in pod.containers:
                if devices := [*_of_plugins(container), *_of_claims(container)]:
                    found[Holder(pod.namespace, pod.name, container.name)] = devices
        return found

    async def _asked(self) -> podresources_pb2.ListPodResourcesResponse:
        while True:
            try:
                return await self._kubelet.List(podresources_pb2.ListPodResourcesRequest())
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
            await asyncio.sleep(_BUSY_SECONDS)

    def _why(self, error: grpc.aio.AioRpcError) -> str:
        if error.code() is grpc.StatusCode.UNAVAILABLE and not self._socket.exists():
            return f"the kubelet does not listen at {self._socket}; where its folder is another one, name that (--kubelet)"
        return f"the kubelet cannot be asked at {self._socket}: {error.details() or error.code().name}"


def _of_plugins(container: podresources_pb2.ContainerResources) -> list[Device]:
    return [Device(each.resource_name, name) for each in container.devices for name in each.device_ids]


def _of_claims(container: podresources_pb2.ContainerResources) -> list[Device]:
    return [
        Device(each.driver_name, each.device_name, each.pool_name, tuple(cdi.name for cdi in each.cdi_devices))
        for claim in container.dynamic_resources
        for each in claim.claim_resources
    ]
