"""What a container whose engine is restored gets as it is made: the placeholder before its command, and the control directory.

It is given on the node, by the container runtime's own plugin interface (nri.py), and not in the pod's template: the pod stays as its owner
wrote it, needs no volume for it, and starts as it always did where no agent is there to restore it.
"""

from __future__ import annotations

import functools
from pathlib import Path

from zerowake_proto import nri_pb2

from restore_agent.kubernetes.nri import Adjust
from restore_agent.places.place import CONTROL_DIRECTORY
from restore_agent.places.placeholder import PROGRAM
from restore_agent.snapshots.manifest import check_name
from restore_agent.workload.control_directory import VARIABLE
from zerowake_shared.pod_contract import CAPTURE, CONTAINER, GPUMEM, GPUMEM_FOLDER, SNAPSHOT, ZEROWAKE_FOLDER

_FOLDER = Path(ZEROWAKE_FOLDER) / "bin"  # inside
_GPUMEM = Path(GPUMEM_FOLDER)  # inside
_CONTROL_BYTES = 16 << 20


def injected(folder: Path, gpumem: Path) -> Adjust:
    """`folder`: of the placeholder. `gpumem`: its socket."""
    return functools.partial(_adjustment, folder, gpumem)


def has_placeholder(pid: int) -> bool:
    """Whether the first process of a container is a placeholder, so that it calls by itself. Raises OSError: it has ended."""
    program = str(Path(f"/proc/{pid}/exe").readlink())
    return program.removesuffix(" (deleted)") == str(_FOLDER / PROGRAM)  # a newer agent brings a newer file


def _adjustment(folder: Path, gpumem: Path, pod: nri_pb2.PodSandbox, container: nri_pb2.Container) -> nri_pb2.ContainerAdjustment | None:
    program = str(_FOLDER / PROGRAM)
    if not (pod.labels.get(CAPTURE) or pod.labels.get(SNAPSHOT)) or pod.annotations.get(CONTAINER) != container.name:
        return None
    if not container.args or container.args[0] == program:  # an agent that is just being replaced was asked before
        return None
    control = [f"size={_CONTROL_BYTES}", "mode=1777", "nosuid", "nodev", "noexec"]
    adjustment = nri_pb2.ContainerAdjustment(
        args=["", program, "--", *container.args],
        env=[nri_pb2.KeyValue(key=VARIABLE, value=str(CONTROL_DIRECTORY))],
        mounts=[
            _folder(folder, _FOLDER),
            nri_pb2.Mount(destination=str(CONTROL_DIRECTORY), type="tmpfs", source="tmpfs", options=control),
        ],
    )
    if pod.annotations.get(GPUMEM):
        # The namespace's own socket: by the operator's one tenant would reach another's memory. gpumem opens it when the agent asks.
        tenant = gpumem.parent / "tenants" / check_name("namespace", pod.namespace)
        tenant.mkdir(parents=True, exist_ok=True)
        adjustment.mounts.append(_folder(tenant, _GPUMEM))
        adjustment.env.append(nri_pb2.KeyValue(key="GPUMEM_SOCKET", value=str(_GPUMEM / gpumem.name)))
    return adjustment


def _folder(source: Path, destination: Path) -> nri_pb2.Mount:
    return nri_pb2.Mount(destination=str(destination), type="bind", source=str(source), options=["rbind", "ro", "nosuid", "nodev"])
