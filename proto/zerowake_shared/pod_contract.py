"""What the scaler and the restore agents agree upon for pods: labels, annotations, paths inside, and what no restored pod may have.

The webhook and the controller write these, the node's agent reads them (and writes its two answers). Neither believes the other: what a
pod asks for is refused by the webhook before it is made, and by the agent once more, as the kernel shows the container.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

GROUP: Final = "zerowake.dev"

# Labels; the value is the name of a ModelSnapshot of the pod's own namespace.
SNAPSHOT: Final = f"{GROUP}/snapshot"  # its engine is restored from it
CAPTURE: Final = f"{GROUP}/capture"  # it runs to be captured for it

# Annotation of the pod's owner.
RESTORE: Final = f"{GROUP}/restore"  # "false": this pod starts as if it had no label

# Annotations of the webhook and the controller, for the agent.
CONTAINER: Final = f"{GROUP}/container"  # name of the engine's container
PORT: Final = f"{GROUP}/port"
HEALTH: Final = f"{GROUP}/health"  # path of its health
MODEL: Final = f"{GROUP}/model"
DIGEST: Final = f"{GROUP}/digest"  # which of the snapshots of that name; empty or absent: whichever the name stands for
CANARY: Final = f"{GROUP}/canary"  # {"path": …, "body": …}: the request that proves a replica
NAMES: Final = f"{GROUP}/names"  # JSON list, on a capture pod: what else the engine answers to, LoRA adapters above all
GPUMEM: Final = f"{GROUP}/gpumem"  # "true": gpumem lends to it; "false", written by the owner of a ModelSnapshot's template: never
SECCOMP: Final = f"{GROUP}/seccomp"  # "own": its owner chose a seccomp profile, which it keeps
STALE_ENVIRONMENT: Final = f"{GROUP}/stale-environment"  # "allowed": its engine may keep what the capture pod was called

# Annotations of the controller on a capture pod, for itself and for the snapshot, which keeps them.
CONTENTS: Final = f"{GROUP}/contents"  # hash of the ConfigMaps and Secrets behind its environment, as they were
TEMPLATE: Final = f"{GROUP}/template"  # hash of the template that it is made of

# Annotation of the webhook or of the agent, on a pod with the label that is not restored: why it starts cold.
COLD: Final = f"{GROUP}/cold"

# Annotations of the agent, on a capture pod.
CAPTURED: Final = f"{GROUP}/captured"  # the digest
CAPTURE_FAILED: Final = f"{GROUP}/capture-failed"  # why not
CAPTURE_MISSED: Final = f"{GROUP}/capture-missed"  # "true", beside why not: nothing was tried, and another pod may do at once
CAPTURE_REFUSED: Final = f"{GROUP}/capture-refused"  # "true", beside it: another try ends in the same way

# Folders in the engine's container that the agent mounts what it needs into.
ZEROWAKE_FOLDER: Final = "/run/zerowake"
GPUMEM_FOLDER: Final = "/run/gpumem"

# Capabilities that reach beyond a container, by their numbers in the kernel (linux/capability.h).
FORBIDDEN_CAPABILITIES: Final[Mapping[str, int]] = {
    "SYS_MODULE": 16,
    "SYS_RAWIO": 17,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "SYS_BOOT": 22,
    "BPF": 39,
    "CHECKPOINT_RESTORE": 40,
}


def is_lent_to(annotations: Mapping[str, str]) -> bool:
    """Whether gpumem lends to the pod that has these annotations: whoever is asked, the runtime or the API server, has them as text."""
    return annotations.get(GPUMEM) == "true"


def replica_id(pod: str, container: str) -> str:
    """The id of the replica that an engine in a pod is, for as long as it lives, whoever names it: one agent, the next one, or the pod's
    status. A container's engine ends with the container, so that a container is one replica.

    pod: its name. container: the runtime's id of it, with or without the scheme before it.
    """
    return f"{pod}.{container.rpartition('/')[2][:12]}"
