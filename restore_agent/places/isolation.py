"""Whether a container is isolated from its node: only such a one is restored into, whatever its pod said that it would be."""

from __future__ import annotations

from pathlib import Path

from restore_agent.errors import AgentError
from restore_agent.pages.images import Rights
from restore_agent.places import processes
from restore_agent.places.cgroups import node_process
from zerowake_shared.pod_contract import FORBIDDEN_CAPABILITIES

_NAMESPACES = ("pid", "mnt", "net", "ipc", "uts")
_RIGHTS_OVER_THE_NODE = sum(1 << number for number in FORBIDDEN_CAPABILITIES.values())  # in the bounding set


class NotIsolated(AgentError):
    """The container shares something with the node, has rights over it, or has ended."""

    reason = "sandbox-failed"


def check_isolated(pid: int) -> None:
    """Raises NotIsolated unless the process is pid 1 of a container that has namespaces of its own and no rights over the node."""
    try:
        found = processes.status(pid)
        shared = [kind for kind in _NAMESPACES if _namespace(f"/proc/{pid}", kind) == _namespace(node_process(), kind)]
        foreign = _namespace(f"/proc/{pid}", "user") != _namespace(node_process(), "user")
    except OSError as error:
        raise NotIsolated(f"the container has ended: {error}") from None
    if processes.pid_inside(found) != 1:
        raise NotIsolated(f"the caller (pid {pid}) is not pid 1 of a container")
    if shared:
        raise NotIsolated(f"the container shares the node's {', '.join(shared)} namespace; its pod asks for access to the host")
    if int(found["CapBnd"], 16) & _RIGHTS_OVER_THE_NODE:
        raise NotIsolated("the container has rights over the node (privileged, or CAP_SYS_ADMIN and its like)")
    if foreign:
        raise NotIsolated("the container has a user namespace of its own; set hostUsers: true in its pod")


def rights_of(pid: int) -> Rights:
    """What a process may do. Raises OSError: it has ended."""
    found = {name: words.split() for name, words in processes.status(pid).items()}
    return Rights(
        frozenset(map(int, found["Uid"])),
        frozenset(map(int, [*found["Gid"], *found["Groups"]])),
        int(found["CapBnd"][0], 16) | int(found["CapPrm"][0], 16),
        found["NoNewPrivs"] == ["1"],
        found["Seccomp"] != ["0"],
    )


def _namespace(process: str, kind: str) -> int:
    return Path(f"{process}/ns/{kind}").stat().st_ino
