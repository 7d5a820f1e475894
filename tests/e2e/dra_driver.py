"""A driver of dynamic resource allocation (DRA), for tests. Run on the node: NODE DRIVER DEVICE…

A device is NAME=UUID, or NAME=UUID=FILE where a container whose claim has it finds that file of the node's under the same name in its /dev.
It publishes them as a ResourceSlice with the attribute `uuid`, and a DeviceClass of its own name for all of them; it registers with the
kubelet as any other driver does; and what a claim brings into a container it says in a file of the Container Device Interface (CDI), whose
names hold the claim's uid alone, as those of NVIDIA's driver do.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from gpumem.wire.plain_messages import defined

_REGISTRY, _PLUGINS, _CDI = Path("/var/lib/kubelet/plugins_registry"), Path("/var/lib/kubelet/plugins"), Path("/var/run/cdi")
# Of the APIs (pluginregistration v1, dra v1) what is used here; a map is a list of keys and values.
_MESSAGES = defined(
    {
        "PluginInfo": [(1, "type", "string"), (2, "name", "string"), (3, "endpoint", "string"), (4, "supported_versions", "string", True)],
        "RegistrationStatus": [(1, "plugin_registered", "bool"), (2, "error", "string")],
        "Claim": [(1, "namespace", "string"), (2, "uid", "string"), (3, "name", "string")],
        "Claims": [(1, "claims", "Claim", True)],  # of both requests
        "Device": [
            (1, "request_names", "string", True),
            (2, "pool_name", "string"),
            (3, "device_name", "string"),
            (4, "cdi_device_ids", "string", True),
        ],
        "Prepared": [(1, "devices", "Device", True), (2, "error", "string")],
        "PreparedClaim": [(1, "key", "string"), (2, "value", "Prepared")],
        "NodePrepareResourcesResponse": [(1, "claims", "PreparedClaim", True)],
        "Unprepared": [(1, "error", "string")],
        "UnpreparedClaim": [(1, "key", "string"), (2, "value", "Unprepared")],
        "NodeUnprepareResourcesResponse": [(1, "claims", "UnpreparedClaim", True)],
    },
    {},
)
_Method = Callable[[bytes], Any]


def message(name: str, /, **fields: Any) -> Any:
    return _MESSAGES[name](**fields)


class Service(grpc.GenericRpcHandler):
    """Of methods by their names."""

    def __init__(self, methods: dict[str, _Method]) -> None:
        self._methods = methods

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = self._methods.get(handler_call_details.method.rpartition("/")[2])
        return grpc.unary_unary_rpc_method_handler(lambda request, context: method(request).SerializeToString()) if method else None


class Driver:
    def __init__(self, node: str, name: str, devices: list[str]) -> None:
        self.node = node
        self.name = name
        self.socket = _PLUGINS / name / "dra.sock"
        self._devices = {name: (uuid, file) for name, uuid, file in ([*each.split("="), ""][:3] for each in devices)}

    def publish(self) -> None:
        devices = [{"name": name, "attributes": {"uuid": {"string": uuid}}} for name, (uuid, _) in self._devices.items()]
        pool = {"name": self.node, "generation": 1, "resourceSliceCount": 1}
        spec = {"driver": self.name, "nodeName": self.node, "pool": pool, "devices": devices}
        selectors = [{"cel": {"expression": f'device.driver == "{self.name}"'}}]
        kinds = {"apiVersion": "resource.k8s.io/v1", "metadata": {"name": self.name}}
        of_class, of_slice = {"kind": "DeviceClass", "spec": {"selectors": selectors}}, {"kind": "ResourceSlice", "spec": spec}
        kubectl("apply", "--filename=-", given={"apiVersion": "v1", "kind": "List", "items": [kinds | of_class, kinds | of_slice]})

    def info(self, request: bytes) -> Any:
        return message("PluginInfo", type="DRAPlugin", name=self.name, endpoint=str(self.socket), supported_versions=["v1.DRAPlugin"])

    def registered(self, request: bytes) -> Any:
        status = _MESSAGES["RegistrationStatus"].FromString(request)
        print("registered" if status.plugin_registered else f"refused: {status.error}", flush=True)
        return message("Unprepared")  # which is as empty

    def prepare(self, request: bytes) -> Any:
        claims = _MESSAGES["Claims"].FromString(request).claims
        prepared = [message("PreparedClaim", key=claim.uid, value=self._prepared(claim)) for claim in claims]
        return message("NodePrepareResourcesResponse", claims=prepared)

    def unprepare(self, request: bytes) -> Any:
        claims = _MESSAGES["Claims"].FromString(request).claims
        for claim in claims:
            self._cdi(claim.uid).unlink(missing_ok=True)
        done = [message("UnpreparedClaim", key=claim.uid, value=message("Unprepared")) for claim in claims]
        return message("NodeUnprepareResourcesResponse", claims=done)

    def _prepared(self, claim: Any) -> Any:
        found = json.loads(kubectl("get", "resourceclaim", claim.name, f"--namespace={claim.namespace}", "--output=json"))
        kind = f"k8s.{self.name}/claim"
        devices, specs = [], []
        for each in found["status"]["allocation"]["devices"]["results"]:
            if each["driver"] != self.name:
                continue
            name = f"{claim.uid}-{each['device']}"
            uuid, file = self._devices[each["device"]]
            nodes = [{"path": f"/dev/{Path(file).name}", "hostPath": file}] if file else []
            specs.append({"name": name, "containerEdits": {"env": [f"CLAIMED={uuid}"], "deviceNodes": nodes}})
            names = {"request_names": [each["request"]], "pool_name": each["pool"], "device_name": each["device"]}
            devices.append(message("Device", **names, cdi_device_ids=[f"{kind}={name}"]))
        self._cdi(claim.uid).write_text(json.dumps({"cdiVersion": "0.6.0", "kind": kind, "devices": specs}))
        return message("Prepared", devices=devices)

    def _cdi(self, uid: str) -> Path:
        return _CDI / f"{self.name}-{uid}.json"


def kubectl(*arguments: str, given: object = None) -> str:
    return subprocess.run(["kubectl", *arguments], input=json.dumps(given), stdout=subprocess.PIPE, text=True, check=True).stdout


def main(node: str, name: str, devices: list[str]) -> None:
    driver = Driver(node, name, devices)
    for folder in (driver.socket.parent, _CDI):
        folder.mkdir(parents=True, exist_ok=True)
    driver.publish()
    registration = _REGISTRY / f"{name}-reg.sock"
    servers = []
    for socket, methods in (
        (driver.socket, {"NodePrepareResources": driver.prepare, "NodeUnprepareResources": driver.unprepare}),
        (registration, {"GetInfo": driver.info, "NotifyRegistrationStatus": driver.registered}),
    ):
        socket.unlink(missing_ok=True)
        servers.append(grpc.server(futures.ThreadPoolExecutor(4)))
        servers[-1].add_generic_rpc_handlers([Service(methods)])
        servers[-1].add_insecure_port(f"unix:{socket}")
        servers[-1].start()
    try:
        servers[0].wait_for_termination()
    finally:
        registration.unlink(missing_ok=True)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, int(signal.SIGINT))  # PR_SET_PDEATHSIG: it ends with nsenter, by which it came to the node
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
