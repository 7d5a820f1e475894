"""The names of what a scale-up, and a capture, spend their time on: in logs, metrics, traces, the agents' messages and the state.

An agent measures parts, which are named `PHASE.PART`; a scale-up has the sums. On the wire a phase is its name, as text: one that a newer
program says, and this one does not know, is shown by that name, after those that are known.
"""

from __future__ import annotations

import enum


class Phase(enum.StrEnum):
    """Those of a scale-up first, in the order in which they come; then the parts of them; then those of a capture."""

    HELD = "held"  # the request is read, and waits
    PUSHED = "pushed"  # KEDA is told
    CREATED = "created"  # there is a pod
    SCHEDULED = "scheduled"  # it has a node, or this machine an agent's ear
    STARTED = "started"  # its kubelet and runtime have begun
    FETCH = "fetch"  # the snapshot comes to the node
    VERIFY = "verify"  # it fits pod and node
    STAGED = "staged"  # its image comes into memory
    IMAGE = "image"
    WEIGHTS = "weights"  # beside the image
    CUDA = "cuda"
    ATTACH = "attach"  # the engine has its weights again
    HEALTH = "health"  # it says that it is well
    FIRST_BYTE = "first_byte"  # from the hand-over of the request to the answer
    UNACCOUNTED = "unaccounted"  # what none of these accounts for

    STAGED_PAGES = "staged.pages"  # the fill waits for pages
    IMAGE_SANDBOX = "image.sandbox"
    IMAGE_CACHES = "image.caches"
    IMAGE_ADDRESSES = "image.addresses"  # CRIU's files get the addresses of the pod
    IMAGE_CONTENTS = "image.contents"  # what the engine had written comes, and the files that it maps are compared
    IMAGE_CRIU = "image.criu"
    IMAGE_FILL = "image.fill"
    IMAGE_WAKE = "image.wake"
    CUDA_RESTORE = "cuda.restore"
    CUDA_UNLOCK = "cuda.unlock"

    START = "start"
    READY = "ready"
    REQUEST = "request"
    QUIESCE = "quiesce"
    CACHES = "caches"
    SUSPEND = "suspend"
    DUMP = "dump"
    RESUME = "resume"
    SPLIT = "split"
    PROVE = "prove"
    PUBLISH = "publish"

    @classmethod
    def whole(cls, name: str) -> str:
        """The phase that a part belongs to: `image` of `image.criu`."""
        return name.partition(".")[0]


SCALE_UP = tuple(Phase)[: list(Phase).index(Phase.UNACCOUNTED)]


def in_order(names: list[str]) -> list[str]:
    """Of a scale-up: as they come, those that are not known here after those that are, as they stand."""
    return sorted(names, key=lambda name: SCALE_UP.index(Phase(name)) if name in SCALE_UP else len(SCALE_UP))
