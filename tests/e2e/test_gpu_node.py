"""How a GPU comes into a container of the test cluster: the driver's description, the plugin that names it, the runtime that reads it.

No GPU is needed: a description names devices and files, and any will do.
"""

from __future__ import annotations

import asyncio
import errno
import json
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.api import Api, Object
from tests.e2e.cluster import node
from tests.e2e.cluster.control import enter
from tests.e2e.cluster.gpu_runtime import given
from tests.e2e.cluster.gpus import CDI_FILE, LIBRARY_FOLDER, Gpus, describe_to_node
from tests.e2e.cluster.layout import NODE, PAUSE_IMAGE
from tests.e2e.cluster.node import give_controllers

FULL = {"major": 1, "minor": 7}  # /dev/full
WORDS = "a library"


def description(file: Path, kind: str = "nvidia.com/gpu") -> dict[str, object]:
    """One GPU, whose device node is /dev/full, and a driver of one file."""
    mount = {"hostPath": str(file), "containerPath": "/usr/lib/libcuda.so.1", "options": ["ro", "bind"]}
    edits = {"deviceNodes": [{"path": "/dev/full"}]}
    devices = [{"name": name, "containerEdits": edits} for name in ("GPU-1", "all")]
    return {"cdiVersion": "0.6.0", "kind": kind, "devices": devices, "containerEdits": {"mounts": [mount]}}


def configuration(*env: str) -> dict[str, Any]:
    return {"process": {"env": list(env)}, "linux": {}, "mounts": []}


def test_a_container_that_asks_gets_devices_and_driver_and_no_other_does(tmp_path: Path) -> None:
    asks = configuration("PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all")
    given(asks, description(tmp_path))
    (device,) = asks["linux"]["devices"]
    assert device | {"path": "/dev/full", "type": "c", **FULL} == device
    assert {"allow": True, "type": "c", "access": "rwm", **FULL} in asks["linux"]["resources"]["devices"]
    assert [mount["destination"] for mount in asks["mounts"]] == ["/usr/lib/libcuda.so.1"]
    for env in ((), ("NVIDIA_VISIBLE_DEVICES=void",), ("NVIDIA_VISIBLE_DEVICES=GPU-2",)):
        asks = configuration(*env)
        given(asks, description(tmp_path))
        assert asks == configuration(*env)


def test_a_privileged_container_has_each_device_once(tmp_path: Path) -> None:
    asks = configuration("NVIDIA_VISIBLE_DEVICES=all")
    asks["linux"]["devices"] = [{"path": "/dev/full", "type": "c", **FULL}]
    given(asks, description(tmp_path))
    assert len(asks["linux"]["devices"]) == 1


def test_a_description_has_every_gpu_by_name_and_files_where_links_lead(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib"
    folder.mkdir(parents=True)
    (folder / "libcuda.so.580.1").write_text(WORDS)
    (folder / "libcuda.so.1").symlink_to("libcuda.so.580.1")
    gpus = Gpus(
        {"GPU-1": Path("/dev/nvidia3"), "GPU-2": Path("/dev/nvidia5")}, (Path("/dev/nvidiactl"),), (Path("/usr/lib/libcuda.so.1"),), ()
    )
    said: Any = gpus.specification(tmp_path)
    named = {device["name"]: [node["path"] for node in device["containerEdits"]["deviceNodes"]] for device in said["devices"]}
    assert named == {"GPU-1": ["/dev/nvidia3"], "GPU-2": ["/dev/nvidia5"], "all": ["/dev/nvidia3", "/dev/nvidia5"]}
    mounts = said["containerEdits"]["mounts"]
    assert {mount["hostPath"] for mount in mounts} == {str(folder / "libcuda.so.580.1")}
    assert [mount["containerPath"] for mount in mounts] == [str(LIBRARY_FOLDER / "libcuda.so.1"), "/usr/lib/libcuda.so.1"]


def test_controllers_that_are_not_given_yet_are_given(tmp_path: Path) -> None:
    give_controllers(tmp_path)  # version 1 has none of it
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    give_controllers(tmp_path)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "cpu\n+cpuset+memory"


def test_a_controller_that_a_kubelet_needs_and_that_is_not_given_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(root: Path, name: str) -> None:
        raise OSError(errno.EINVAL, "refused")

    monkeypatch.setattr(node, "give_controller", refuse)
    (tmp_path / "cgroup.subtree_control").write_text("")
    (tmp_path / "cgroup.controllers").write_text("rdma")
    give_controllers(tmp_path)
    (tmp_path / "cgroup.controllers").write_text("rdma memory")
    with pytest.raises(SystemExit, match=r"does not give memory to the groups below it"):
        give_controllers(tmp_path)


@pytest.fixture
async def described(api: Api, tmp_path: Path) -> AsyncIterator[str]:
    """The node has a resource with one device, and its description. Yields the resource."""
    resource = f"zerowake.test/gpu-{secrets.token_hex(3)}"  # CDI knows no class that begins with a digit
    library = tmp_path / "libcuda.so.1"
    library.write_text(WORDS)
    describe_to_node(description(library, resource))
    program = str(Path(__file__).parent / "device_plugin.py")
    command = [sys.executable, program, "/var/lib/kubelet/device-plugins", resource, f"--cdi={resource}", "GPU-1"]
    process = await asyncio.create_subprocess_exec(*enter(own_processes=False), *command)
    try:
        await api.until("Node", "", NODE, lambda one: one and one["status"]["allocatable"].get(resource) == "1")
        yield resource
    finally:
        process.kill()
        await process.wait()
        subprocess.run([*enter(), "rm", str(CDI_FILE)], check=True)


@pytest.mark.own_cluster("describes devices to its node")
async def test_pods_are_given_what_is_described(api: Api, namespace: str, described: str) -> None:
    runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia"}
    await asyncio.to_thread(
        subprocess.run, [*enter(), "kubectl", "apply", "-f", "-"], input=json.dumps(runtime), text=True, check=True, capture_output=True
    )
    shows = [
        "sh",
        "-c",
        "echo $(ls /dev/full /usr/lib/libcuda.so.1 2>&1); cat /usr/lib/libcuda.so.1; exec 2>&1; (: >/dev/full) && echo opened",
    ]

    async def said(name: str, container: Object, **spec: Any) -> str:
        one = {"name": "shows", "image": PAUSE_IMAGE, "imagePullPolicy": "Never", "command": shows, **container}
        rest = {"nodeName": NODE, "restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [one], **spec}
        await api.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": rest}, namespace=namespace)
        await api.until("Pod", namespace, name, lambda found: found and found["status"]["phase"] in ("Succeeded", "Failed"))
        return await api.log_of(namespace, name)

    by_plugin = await said("plugin", {"resources": {"limits": {described: 1}}})
    by_variable = await said("variable", {"env": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]}, runtimeClassName="nvidia")
    assert by_plugin == by_variable == f"/dev/full /usr/lib/libcuda.so.1\n{WORDS}opened\n"
    assert WORDS not in await said("neither", {}, runtimeClassName="nvidia")
