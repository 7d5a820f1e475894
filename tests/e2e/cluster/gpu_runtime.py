"""The OCI runtime behind the runtime class `nvidia`: runc, which it gives way to after a look at each container that is made.

A container that asks for GPUs by NVIDIA_VISIBLE_DEVICES is given what the node's CDI description says (gpus.py). NVIDIA's own runtime does
the same on real nodes. Run by containerd's shim as it would run runc, by a Python that has nothing but its standard library.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

CDI_FILE = Path("/etc/cdi/nvidia.json")
VARIABLE = "NVIDIA_VISIBLE_DEVICES"
RUNTIME = "runc"


def main(arguments: list[str]) -> None:
    if "create" in arguments and CDI_FILE.exists():
        bundle = Path(arguments[arguments.index("--bundle") + 1], "config.json")
        container = json.loads(bundle.read_text())
        given(container, json.loads(CDI_FILE.read_text()))
        bundle.write_text(json.dumps(container))
    os.execvp(RUNTIME, [RUNTIME, *arguments])


def given(container: dict[str, Any], described: dict[str, Any]) -> None:
    """Adds to the container's configuration what it asks for; nothing where it asks for none."""
    env = dict(each.partition("=")[::2] for each in container["process"].get("env", []))
    asked = [name for name in env.get(VARIABLE, "").split(",") if name not in ("", "void", "none")]
    edits = [device["containerEdits"] for device in described["devices"] if device["name"] in asked]
    if not edits:
        return
    for each in (*edits, described["containerEdits"]):
        for node in each.get("deviceNodes", []):
            add_device(container["linux"], node["path"])
        for mount in each.get("mounts", []):
            one = {"destination": mount["containerPath"], "source": mount["hostPath"], "type": "bind", "options": mount["options"]}
            container["mounts"].append(one)


def add_device(linux: dict[str, Any], path: str) -> None:
    about = os.stat(path)  # noqa: PTH116
    number = {"type": "c", "major": os.major(about.st_rdev), "minor": os.minor(about.st_rdev)}
    if all(device["path"] != path for device in linux.setdefault("devices", [])):  # a privileged container has all of the node's
        linux["devices"].append({"path": path, **number, "fileMode": stat.S_IMODE(about.st_mode), "uid": 0, "gid": 0})
    linux.setdefault("resources", {}).setdefault("devices", []).append({"allow": True, **number, "access": "rwm"})


if __name__ == "__main__":
    main(sys.argv[1:])
