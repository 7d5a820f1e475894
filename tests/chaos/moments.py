"""The moments at which a process is hit: as each phase begins that the enum has (zerowake_shared/phases.py), and this stack passes.

A phase of the enum is either STRUCK, or NOT_PASSED for the reason that is given; a test holds the enum to that.
"""

from __future__ import annotations

from zerowake_shared.phases import Phase

AT_ONCE = "at once"
# There all the time: each of them is hit at once, and as each phase begins, whether it has a part in that or not.
_STANDING = "scaler", "agent", "gpumem", "filler", "s3"
# Who else is there as a phase begins, or comes in it.
STRUCK: dict[Phase, tuple[str, ...]] = {
    Phase.HELD: (),
    Phase.PUSHED: (),
    Phase.SCHEDULED: (),
    Phase.FETCH: (),
    Phase.STAGED: ("sandbox",),
    Phase.WEIGHTS: ("engine", "sandbox"),  # of a restore, and of a capture
    Phase.HEALTH: ("engine", "sandbox"),  # of a cold start
    Phase.FIRST_BYTE: ("engine", "sandbox"),
    Phase.STAGED_PAGES: ("engine", "sandbox", "criu"),
    Phase.IMAGE_SANDBOX: ("sandbox",),
    Phase.IMAGE_CACHES: (),
    Phase.IMAGE_ADDRESSES: ("sandbox",),
    Phase.IMAGE_CONTENTS: ("sandbox", "criu"),
    Phase.IMAGE_CRIU: ("sandbox", "criu"),
    Phase.IMAGE_FILL: ("engine", "sandbox", "criu"),
    Phase.IMAGE_WAKE: ("engine", "sandbox", "criu"),
    Phase.START: ("engine", "sandbox"),
    Phase.READY: ("engine", "sandbox"),
    Phase.REQUEST: ("engine", "sandbox"),
    Phase.QUIESCE: ("engine", "sandbox"),
    Phase.CACHES: ("engine", "sandbox"),
    Phase.DUMP: ("engine", "sandbox", "criu"),
    Phase.SPLIT: ("engine", "sandbox"),
    Phase.PROVE: ("engine", "sandbox", "criu"),
    Phase.PUBLISH: ("engine", "sandbox"),
}
_GPU, _KUBERNETES = "takes a GPU", "takes Kubernetes: it is a pod's"
NOT_PASSED: dict[Phase, str] = {
    Phase.CREATED: _KUBERNETES,
    Phase.STARTED: _KUBERNETES,
    Phase.VERIFY: f"{_KUBERNETES}; on one machine it is part of a fetch, and of the look for a snapshot before anybody asks",
    Phase.ATTACH: "nothing measures it: an engine has its weights within `weights`",
    Phase.IMAGE: "the sum of its parts, each of which is struck",
    Phase.UNACCOUNTED: "what is left over of a sum, and no part of the work",
    Phase.CUDA: _GPU,
    Phase.CUDA_RESTORE: _GPU,
    Phase.CUDA_UNLOCK: _GPU,
    Phase.SUSPEND: _GPU,
    Phase.RESUME: _GPU,
}
# Each victim with each of its moments.
STRIKES: tuple[tuple[str, str], ...] = (
    *((victim, AT_ONCE) for victim in (*_STANDING, "engine")),
    *((victim, str(phase)) for phase, others in STRUCK.items() for victim in (*_STANDING, *others)),
)
