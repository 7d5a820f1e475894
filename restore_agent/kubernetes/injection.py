"""What a container whose engine is restored gets as it is made: the placeholder before its command, the control directory, the packages
that engines may import (engine_packages.py), the seccomp policy (seccomp.py), and the socket of gpumem where that lends to it.

It is given on the node, by the container runtime's own plugin interface (nri.py), and not in the pod's template: the pod and its image stay
as their owner made them, need no volume for it, and start as they always did where no agent is there to restore them.

What its owner set stays: folders are added behind those of their own PYTHONPATH, and their GPUMEM_SOCKET and seccomp profile count. To a
program that is not Python, and to one that imports nothing of it, all this is one variable and one folder that it does not look at. So no
image is asked what it runs, and no pod has to say that it wants it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from zerowake_proto import nri_pb2

from restore_agent.kubernetes.engine_packages import INSIDE, EnginePackages
from restore_agent.kubernetes.nri import Adjust
from restore_agent.kubernetes.seccomp import policy
from restore_agent.places.place import CONTROL_DIRECTORY
from restore_agent.places.placeholder import PROGRAM
from restore_agent.snapshots.manifest import check_name
from restore_agent.workload.control_directory import VARIABLE
from zerowake_shared.pod_contract import CAPTURE, CONTAINER, GPUMEM_FOLDER, SECCOMP, SNAPSHOT, ZEROWAKE_FOLDER, is_lent_to

_FOLDER = Path(ZEROWAKE_FOLDER) / "bin"  # inside
_GPUMEM = Path(GPUMEM_FOLDER)  # inside
_CONTROL_BYTES = 16 << 20
_PYTHON_PATH = "PYTHONPATH"


def injected(folder: Path, packages: EnginePackages, gpumem: Path) -> Adjust:
    """`folder`: of the placeholder. `gpumem`: its socket."""
    return functools.partial(_adjustment, folder, packages, gpumem)


def gpumem_socket(gpumem: Path) -> Path:
    """Where a container finds the socket of its namespace."""
    return _GPUMEM / gpumem.name


def has_placeholder(pid: int) -> bool:
    """Whether the first process of a container is a placeholder, so that it calls by itself. Raises OSError: it has ended."""
    program = str(Path(f"/proc/{pid}/exe").readlink())
    return program.removesuffix(" (deleted)") == str(_FOLDER / PROGRAM)  # a newer agent brings a newer file


def is_made_with_placeholder(command: Sequence[str]) -> bool:
    """Whether a container that was made with this command begins as a placeholder."""
    return bool(command) and command[0] == str(_FOLDER / PROGRAM)


def _adjustment(
    folder: Path, packages: EnginePackages, gpumem: Path, pod: nri_pb2.PodSandbox, container: nri_pb2.Container
) -> nri_pb2.ContainerAdjustment | None:
    program = str(_FOLDER / PROGRAM)
    if not (pod.labels.get(CAPTURE) or pod.labels.get(SNAPSHOT)) or pod.annotations.get(CONTAINER) != container.name:
        return None
    if not container.args or container.args[0] == program:  # an agent that is just being replaced was asked before
        return None
    given = dict(each.partition("=")[::2] for each in container.env)
    env = {
        VARIABLE: str(CONTROL_DIRECTORY),
        _PYTHON_PATH: ":".join(part for part in (given.get(_PYTHON_PATH), packages.path) if part),
    }
    control = [f"size={_CONTROL_BYTES}", "mode=1777", "nosuid", "nodev", "noexec"]
    mounts = [
        _folder(folder, _FOLDER),
        nri_pb2.Mount(destination=str(CONTROL_DIRECTORY), type="tmpfs", source="tmpfs", options=control),
        _folder(packages.folder, INSIDE),
    ]
    if is_lent_to(pod.annotations):
        # The namespace's own socket: by the operator's one tenant would reach another's memory. gpumem opens it when the agent asks.
        tenant = gpumem.parent / "tenants" / check_name("namespace", pod.namespace)
        tenant.mkdir(parents=True, exist_ok=True)
        mounts.append(_folder(tenant, _GPUMEM))
        env["GPUMEM_SOCKET"] = given.get("GPUMEM_SOCKET") or str(gpumem_socket(gpumem))
    seccomp = None if pod.annotations.get(SECCOMP) == "own" else policy()
    return nri_pb2.ContainerAdjustment(
        args=["", program, "--", *container.args],
        env=[nri_pb2.KeyValue(key=key, value=value) for key, value in env.items()],
        mounts=mounts,
        linux=nri_pb2.LinuxContainerAdjustment(seccomp_policy=seccomp),
    )


def _folder(source: Path, destination: Path) -> nri_pb2.Mount:
    return nri_pb2.Mount(destination=str(destination), type="bind", source=str(source), options=["rbind", "ro", "nosuid", "nodev"])
