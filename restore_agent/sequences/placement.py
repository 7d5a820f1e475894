"""On which GPUs of this node a suspended process tree wakes.

It may wake on any GPUs of the model that it was suspended on, one for one. Those that hold its weights come first (weights read over NVLink
are a third as fast), then the ones it had, then those with the most free memory: so replicas stay together while they fit and spread when
they do not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from restore_agent.errors import AgentError, ErrorKind

HEADROOM = 64 << 20  # bytes of a GPU beside what the checkpoint gave back: a resume that runs out strands its process


class NoGpuMemory(AgentError):
    """No GPU of the node has the memory that a resume needs; nothing was begun. `lacking`: bytes, by UUID of the GPUs that could serve."""

    kind = ErrorKind.EXHAUSTED
    reason = "no-gpu-memory"

    def __init__(self, message: str, lacking: Mapping[str, int]) -> None:
        super().__init__(message)
        self.lacking = lacking


def choose_gpus(
    needed: Mapping[str, int],
    before: Sequence[str],
    here: Sequence[str],
    free: Mapping[str, int],
    resident: Collection[str],
    barred: Collection[str] = (),
) -> dict[str, str]:
    """Pairs each GPU of the suspend with one of this node.

    Args:
        needed: bytes of each GPU that was used, by its UUID then.
        before, here: UUIDs of all GPUs of the driver, then and now, equally many.
        free: bytes of each GPU here.
        resident: GPUs here that hold the weights.
        barred: GPUs here that are for none of the used ones.

    Raises:
        NoGpuMemory: one of them finds no GPU.
    """
    pairs: dict[str, str] = {}
    for old, size in sorted(needed.items(), key=lambda each: -each[1]):
        candidates = [new for new in here if new not in pairs.values() and new not in barred]
        roomy = [new for new in candidates if free[new] >= size + HEADROOM]
        if not roomy:
            most = max((free[new] for new in candidates), default=0)
            raise NoGpuMemory(
                f"resuming needs {(size + HEADROOM) >> 20} MiB of a GPU and {most >> 20} MiB are free at most; end a replica, or give the "
                "pool less",
                {new: size + HEADROOM - free[new] for new in candidates},
            )
        pairs[old] = max(roomy, key=lambda new: (new in resident, new == old, free[new]))
    # The unused ones are paired as well: each with itself where it is here and left over.
    rest = [new for new in here if new not in pairs.values()]
    for old in before:
        if old not in pairs:
            pairs[old] = old if old in rest else rest[-1]
            rest.remove(pairs[old])
    return pairs
