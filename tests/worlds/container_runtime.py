"""A container runtime's CRI socket: real gRPC, and the answers that containerd gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
from zerowake_proto import cri_pb2, cri_pb2_grpc

from tests.worlds.grpc_socket import served_at


class ContainerRuntime(cri_pb2_grpc.RuntimeServiceServicer):
    """Knows the containers that a test has put into `containers`, by their ids."""

    def __init__(self) -> None:
        self.containers: dict[str, cri_pb2.ContainerStatusResponse] = {}
        self.addresses = ["10.1.2.3"]  # of every pod
        self.asked: set[str] = set()  # containers

    def serve(self, socket: Path) -> AbstractAsyncContextManager[None]:
        return served_at(socket, lambda server: cri_pb2_grpc.add_RuntimeServiceServicer_to_server(self, server))

    def add(
        self, container: str, pid: int, namespace: str, pod: str, uid: str, name: str = "engine", command: Sequence[str] = ("server",)
    ) -> None:
        about = {"pid": pid, "sandboxID": "sandbox", "runtimeSpec": {"process": {"args": [*command]}}}
        labels = {"container.name": name, "pod.name": pod, "pod.uid": uid, "pod.namespace": namespace}
        status = cri_pb2.ContainerStatus(
            id=container,
            image_ref="sha256:0123",
            labels={f"io.kubernetes.{key}": value for key, value in labels.items()},
            log_path=f"/var/log/pods/{namespace}_{pod}_{uid}/{name}/0.log",
        )
        self.containers[container] = cri_pb2.ContainerStatusResponse(status=status, info={"info": json.dumps(about)})

    async def Version(self, request: cri_pb2.VersionRequest, context: Any) -> cri_pb2.VersionResponse:
        return cri_pb2.VersionResponse(runtime_name="containerd", runtime_version="2")

    async def ContainerStatus(self, request: cri_pb2.ContainerStatusRequest, context: Any) -> cri_pb2.ContainerStatusResponse:
        if request.container_id not in self.containers:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no container {request.container_id[:12]}")
        self.asked.add(request.container_id)
        return self.containers[request.container_id]

    async def PodSandboxStatus(self, request: cri_pb2.PodSandboxStatusRequest, context: Any) -> cri_pb2.PodSandboxStatusResponse:
        first, *more = self.addresses or [""]
        network = cri_pb2.PodSandboxNetworkStatus(ip=first, additional_ips=[cri_pb2.PodIP(ip=other) for other in more])
        return cri_pb2.PodSandboxStatusResponse(status=cri_pb2.PodSandboxStatus(id=request.pod_sandbox_id, network=network))
