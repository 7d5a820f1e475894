"""Whether a container is apart from its node: only such a one is restored into, whatever its pod said that it would be."""

from __future__ import annotations

from pathlib import Path

from restore_agent.errors import AgentError
from restore_agent.places.cgroups import node_process
from zerowake_shared.pod_contract import FORBIDDEN_CAPABILITIES

_APART = ("pid", "mnt", "net", "ipc", "uts")
_RIGHTS_OVER_THE_NODE = sum(1 << number for number in FORBIDDEN_CAPABILITIES.values())  # in the bounding set


class NotApart(AgentError):
    """The container shares something with the node, has rights over it, or has ended."""

    reason = "sandbox-failed"


def check_apart(pid: int) -> None:
    """Raises NotApart unless the process is pid 1 of a container that has namespaces of its own and no rights over the node."""
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        shared = [kind for kind in _APART if _namespace(f"/proc/{pid}", kind) == _namespace(node_process(), kind)]
        foreign = _namespace(f"/proc/{pid}", "user") != _namespace(node_process(), "user")
    except OSError as error:
        raise NotApart(f"the container has ended: {error}") from None
    if status["NSpid"].split()[-1] != "1":
        raise NotApart(f"the caller (pid {pid}) is not pid 1 of a container")
    if shared:
        raise NotApart(f"the container shares the node's {', '.join(shared)} namespace; its pod asks for access to the host")
    if int(status["CapBnd"], 16) & _RIGHTS_OVER_THE_NODE:
        raise NotApart("the container has rights over the node (privileged, or CAP_SYS_ADMIN and its like)")
    if foreign:
        raise NotApart("the container has a user namespace of its own; set hostUsers: true in its pod")


def _namespace(process: str, kind: str) -> int:
    return Path(f"{process}/ns/{kind}").stat().st_ino
