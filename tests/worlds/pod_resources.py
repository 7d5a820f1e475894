"""The kubelet's pod-resources API as a test has it: real gRPC on the kubelet's socket, and a kubelet that can be away, slow, or refuse."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
from zerowake_proto import podresources_pb2 as pb
from zerowake_proto import podresources_pb2_grpc

from restore_agent.kubernetes.pod_resources import SOCKET, Device, Holder
from tests.worlds.grpc_socket import served_at


class KubeletDevices(podresources_pb2_grpc.PodResourcesListerServicer):
    """Says which container has which devices."""

    def __init__(self) -> None:
        self.devices: dict[Holder, list[Device]] = {}
        self.asked = 0
        self.refuses: list[grpc.StatusCode] = []  # once each
        self.answers = asyncio.Event()  # one that is slow has it cleared
        self.answers.set()

    def gives(self, namespace: str, pod: str, *names: str, container: str = "engine", resource: str = "nvidia.com/gpu") -> None:
        """By a device plugin."""
        self.devices[Holder(namespace, pod, container)] = [Device(resource, name) for name in names]

    def grants(self, namespace: str, pod: str, *names: str, container: str = "engine", cdi: tuple[str, ...] = ()) -> None:
        """By a claim."""
        self.devices[Holder(namespace, pod, container)] = [Device("gpu.nvidia.com", name, "node", cdi) for name in names]

    def serve(self, folder: Path) -> AbstractAsyncContextManager[None]:
        """`folder`: the kubelet's. A second time, on the same socket, it is a kubelet that was started anew."""
        socket = folder / SOCKET
        socket.parent.mkdir(parents=True, exist_ok=True)
        socket.unlink(missing_ok=True)
        return served_at(socket, lambda server: podresources_pb2_grpc.add_PodResourcesListerServicer_to_server(self, server))

    async def List(self, request: object, context: Any) -> pb.ListPodResourcesResponse:
        self.asked += 1
        if self.refuses:
            await context.abort(self.refuses.pop(0), "no")
        await self.answers.wait()
        answer = pb.ListPodResourcesResponse()
        for holder, devices in self.devices.items():
            claimed = [
                pb.ClaimResource(
                    driver_name=each.source,
                    pool_name=each.pool,
                    device_name=each.name,
                    cdi_devices=[pb.CDIDevice(name=cdi) for cdi in each.cdi],
                )
                for each in devices
                if each.pool
            ]
            container = pb.ContainerResources(
                name=holder.container,
                devices=[pb.ContainerDevices(resource_name=each.source, device_ids=[each.name]) for each in devices if not each.pool],
                dynamic_resources=[pb.DynamicResource(claim_name="gpus", claim_namespace=holder.namespace, claim_resources=claimed)],
            )
            answer.pod_resources.append(pb.PodResources(namespace=holder.namespace, name=holder.pod, containers=[container]))
        return answer
