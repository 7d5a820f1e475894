"""A device plugin of the kubelet's, for tests. Run on the node: FOLDER RESOURCE [--cdi=KIND] DEVICE…

A device is NAME, or NAME=FILE where a container that gets it finds that file of the node's under the same name in its /dev, and the
device's own in NVIDIA_VISIBLE_DEVICES, as NVIDIA's plugin does it. With --cdi it gets KIND=NAME of the Container Device Interface: what
the node has described under that name.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from gpumem.wire.plain_messages import defined

# Of the API (deviceplugin v1beta1) what is used here; a map is a list of keys and values.
_MESSAGES = defined(
    {
        "RegisterRequest": [(1, "version", "string"), (2, "endpoint", "string"), (3, "resource_name", "string")],
        "Empty": [],
        "Device": [(1, "ID", "string"), (2, "health", "string")],
        "ListAndWatchResponse": [(1, "devices", "Device", True)],
        "ContainerAllocateRequest": [(1, "devices_ids", "string", True)],
        "AllocateRequest": [(1, "container_requests", "ContainerAllocateRequest", True)],
        "Env": [(1, "key", "string"), (2, "value", "string")],
        "DeviceSpec": [(1, "container_path", "string"), (2, "host_path", "string"), (3, "permissions", "string")],
        "CdiDevice": [(1, "name", "string")],
        "ContainerAllocateResponse": [(1, "envs", "Env", True), (3, "devices", "DeviceSpec", True), (5, "cdi_devices", "CdiDevice", True)],
        "AllocateResponse": [(1, "container_responses", "ContainerAllocateResponse", True)],
    },
    {},
)


def message(name: str, /, **fields: Any) -> Any:
    return _MESSAGES[name](**fields)


class Plugin(grpc.GenericRpcHandler):
    def __init__(self, devices: dict[str, str], kind: str = "") -> None:
        self._devices = devices  # name → file of the node; empty: it has none
        self._kind = kind

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        name = handler_call_details.method.rpartition("/")[2]
        if name == "ListAndWatch":
            return grpc.unary_stream_rpc_method_handler(self._list)
        if name == "Allocate":
            return grpc.unary_unary_rpc_method_handler(self._allocate)
        if name in ("GetDevicePluginOptions", "PreStartContainer", "GetPreferredAllocation"):
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
        return None

    def _list(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield message(
            "ListAndWatchResponse", devices=[message("Device", ID=each, health="Healthy") for each in self._devices]
        ).SerializeToString()
        threading.Event().wait()

    def _allocate(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        asked = _MESSAGES["AllocateRequest"].FromString(request).container_requests
        return bytes(message("AllocateResponse", container_responses=[self._given(each.devices_ids) for each in asked]).SerializeToString())

    def _given(self, names: list[str]) -> Any:
        files = [Path(self._devices[name]) for name in names if self._devices[name]]
        specs = [message("DeviceSpec", container_path=f"/dev/{file.name}", host_path=str(file), permissions="rw") for file in files]
        envs = [message("Env", key="NVIDIA_VISIBLE_DEVICES", value=",".join(names))] if files else []
        described = [message("CdiDevice", name=f"{self._kind}={name}") for name in names] if self._kind else []
        return message("ContainerAllocateResponse", envs=envs, devices=specs, cdi_devices=described)


def main(folder: Path, resource: str, devices: list[str]) -> None:
    kind = devices.pop(0).removeprefix("--cdi=") if devices[0].startswith("--cdi=") else ""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([Plugin({name: file for name, _, file in (each.partition("=") for each in devices)}, kind)])
    socket = folder / f"{resource.replace('/', '-')}-{os.getpid()}.sock"
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    with grpc.insecure_channel(f"unix:{folder / 'kubelet.sock'}", options=[("grpc.default_authority", "localhost")]) as channel:
        request = message("RegisterRequest", version="v1beta1", endpoint=socket.name, resource_name=resource)
        channel.unary_unary("/v1beta1.Registration/Register")(request.SerializeToString(), timeout=10)
    print("registered", flush=True)
    try:
        server.wait_for_termination()
    finally:
        socket.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
