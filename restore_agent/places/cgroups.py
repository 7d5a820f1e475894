"""Where a process's cgroups lie in the node's file system, on v1, v2 and both at once."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from restore_agent.errors import AgentError

_MOUNT_WORDS = frozenset({"rw", "ro", "relatime", "xattr", "noprefix", "clone_children", "cpuset_v2_mode"})


class OutOfSight(AgentError):
    """The agent's own namespaces hide the node's cgroups."""

    reason = "sandbox-failed"


@functools.cache
def node_process() -> str:
    """Where the node itself is to be seen: its pid 1; where that is out of reach, the agent runs in no container of its own."""
    return "/proc/1" if os.access("/proc/1/ns/mnt", os.F_OK) else "/proc/self"


def cgroup_files(pid: int) -> list[Path]:
    """cgroup.procs of each hierarchy that the process is in, as the node's pid 1 finds it. Raises OutOfSight."""
    mounts: dict[str, tuple[Path, Path]] = {}  # controllers → (mount point, which part of the hierarchy is there)
    for line in Path(node_process(), "mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            part, point = fields.split()[3:5]
            mounts[_hierarchy(options.split(",")) if kind == "cgroup" else ""] = (Path(point), Path(part))
    files = []
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        found = mounts.get(_hierarchy(controllers.split(",")) if controllers else "")
        if found is None:
            continue  # not mounted on this node
        mount, begin = found
        if "/.." in group or not Path(group).is_relative_to(begin):
            raise OutOfSight(f"cgroup {group} of the container is out of sight; run the agent in the node's cgroup namespace")
        files.append(Path(node_process(), "root") / mount.relative_to("/") / Path(group).relative_to(begin) / "cgroup.procs")
    return files


def _hierarchy(words: Iterable[str]) -> str:
    """One name for `cpu,cpuacct`, in whatever order, and for `rw,name=systemd`."""
    return ",".join(sorted(word for word in words if word not in _MOUNT_WORDS and "=" not in word.removeprefix("name=")))
