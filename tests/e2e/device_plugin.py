"""A device plugin of the kubelet's, for tests: one resource with the devices it is given. Run on the node: FOLDER RESOURCE DEVICE…

Its messages are few and small, so they are written as bytes here: field numbers are the API's (deviceplugin v1beta1).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc

_NONE = b""


def field(number: int, value: bytes) -> bytes:
    assert len(value) < 128, "one byte of length is enough here"
    return bytes([number << 3 | 2, len(value)]) + value


class Plugin(grpc.GenericRpcHandler):
    def __init__(self, devices: list[str]) -> None:
        self._devices = b"".join(field(1, field(1, device.encode()) + field(2, b"Healthy")) for device in devices)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        name = handler_call_details.method.rpartition("/")[2]
        if name == "ListAndWatch":
            return grpc.unary_stream_rpc_method_handler(self._list)
        # Allocate: one container, to which nothing is given but the device's being counted.
        answers = {
            "GetDevicePluginOptions": _NONE,
            "Allocate": field(1, _NONE),
            "PreStartContainer": _NONE,
            "GetPreferredAllocation": _NONE,
        }
        return grpc.unary_unary_rpc_method_handler(lambda request, context: answers[name]) if name in answers else None

    def _list(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield self._devices
        threading.Event().wait()


def main(folder: Path, resource: str, devices: list[str]) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([Plugin(devices)])
    socket = folder / f"{resource.replace('/', '-')}-{os.getpid()}.sock"
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    with grpc.insecure_channel(f"unix:{folder / 'kubelet.sock'}", options=[("grpc.default_authority", "localhost")]) as channel:
        register = channel.unary_unary("/v1beta1.Registration/Register")
        register(field(1, b"v1beta1") + field(2, socket.name.encode()) + field(3, resource.encode()), timeout=10)
    print("registered", flush=True)
    try:
        server.wait_for_termination()
    finally:
        socket.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
