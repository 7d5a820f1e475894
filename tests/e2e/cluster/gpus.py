"""The machine's NVIDIA GPUs, as a container gets them: a description for the Container Device Interface (CDI), at CDI_FILE of the node.

A device plugin names one of its devices and containerd puts in what the description says (so does gpu_runtime.py, for containers that ask
by NVIDIA_VISIBLE_DEVICES): the GPU's device node, those that all GPUs share, and the driver's libraries, in the folder where every loader
looks. It is what NVIDIA's container toolkit writes on real nodes, which test machines lack.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster.control import enter
from tests.e2e.cluster.machine_image import on_machine

KIND = "nvidia.com/gpu"
CDI_FILE = Path("/etc/cdi/nvidia.json")
ALL = "all"  # the device that is all of them
SHARED_NODES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
LIBRARIES = ("libcuda.so*", "libcudadebugger.so*", "libnvidia-*.so*")
PROGRAMS = ("nvidia-smi",)
LIBRARY_FOLDER = Path(f"/usr/lib/{platform.machine()}-linux-gnu")  # in containers
_USUAL = (str(LIBRARY_FOLDER), "/usr/lib64", "/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/wsl/lib")


@dataclass(frozen=True)
class Gpus:
    """Paths as they are on the machine."""

    nodes: dict[str, Path]  # UUID → its device node
    shared: tuple[Path, ...]
    libraries: tuple[Path, ...]
    programs: tuple[Path, ...]

    @classmethod
    def of(cls, machine: Path) -> Gpus:
        """Raises: RuntimeError, what of a driver is missing there."""
        listed = on_machine(machine, "nvidia-smi", "--query-gpu=uuid,pci.bus_id", "--format=csv,noheader")
        nodes = {}
        for line in listed.splitlines():
            uuid, bus = (word.strip() for word in line.split(","))
            nodes[uuid] = Path(f"/dev/nvidia{_minor(machine, bus)}")
        found = (machine / each.relative_to("/") for each in _searched(machine))
        inside = next((each.resolve() for each in found if (each / "libcuda.so.1").exists()), None)
        if inside is None:
            raise RuntimeError("the machine has GPUs and no libcuda.so.1: install its driver's libraries")
        folder = Path("/", inside.relative_to(machine.resolve()))
        libraries = sorted(folder / path.name for pattern in LIBRARIES for path in inside.glob(pattern))
        shared = [Path("/dev", name) for name in SHARED_NODES if Path("/dev", name).exists()]
        programs = [Path("/usr/bin", name) for name in PROGRAMS if (machine / "usr/bin" / name).exists()]
        return cls(nodes, tuple(shared), tuple(libraries), tuple(programs))

    def used_bytes(self, machine: Path) -> int:
        """Of all GPUs together, by the driver's word."""
        listed = on_machine(machine, "nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
        return sum(int(line) for line in listed.split()) << 20

    def specification(self, machine: Path) -> dict[str, object]:
        """In CDI's form. The libraries are where they are on the machine, for what looks into the cache of its loader, and where any loader
        looks. Where the machine's files lie at `machine`, they come from there."""
        everywhere = [(path, LIBRARY_FOLDER / path.name) for path in self.libraries]
        files = dict.fromkeys([*everywhere, *((path, path) for path in (*self.libraries, *self.programs))])
        mounts = [
            {
                # What a link leads to: a mount that is one by one again would lead to nowhere in a container.
                "hostPath": str((machine / path.relative_to("/")).resolve()),
                "containerPath": str(inside),
                "options": ["ro", "nosuid", "nodev", "bind"],
            }
            for path, inside in files
        ]
        devices = [{"name": uuid, "containerEdits": _nodes([node])} for uuid, node in self.nodes.items()]
        devices.append({"name": ALL, "containerEdits": _nodes(self.nodes.values())})
        common = _nodes(self.shared) | {"mounts": mounts}
        return {"cdiVersion": "0.6.0", "kind": KIND, "devices": devices, "containerEdits": common}


def describe_to_node(specification: dict[str, object]) -> None:
    """Written where the node's container runtime looks, anew for each container."""
    write = ["sh", "-c", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "sh", str(CDI_FILE)]
    subprocess.run([*enter(), *write], input=json.dumps(specification), text=True, check=True)


def _nodes(paths: Iterable[Path]) -> dict[str, object]:
    return {"deviceNodes": [{"path": str(path)} for path in paths]}


def _minor(machine: Path, bus: str) -> int:
    """The number in a GPU's node: containers that are machines may have but the third GPU of theirs."""
    known = machine / "proc/driver/nvidia/gpus"
    for folder in known.iterdir() if known.exists() else ():
        # 0000:1b:00.0 there, 00000000:1B:00.0 by nvidia-smi.
        if bus.lower().endswith(folder.name.lower()) and (
            match := re.search(r"Device Minor:\s*(\d+)", (folder / "information").read_text())
        ):
            return int(match[1])
    (only,) = Path("/dev").glob("nvidia[0-9]")
    return int(only.name.removeprefix("nvidia"))


def _searched(machine: Path) -> list[Path]:
    """Where the loader of the machine looks."""
    cached = [Path(line.split(" => ")[1]).parent for line in on_machine(machine, "ldconfig", "-p").splitlines() if "libcuda.so.1 " in line]
    told = [Path(each) for each in os.environ.get("LD_LIBRARY_PATH", "").split(":") if each.startswith("/")]
    return [*told, *cached, *(Path(each) for each in _USUAL)]
