"""The tables in which vLLM's sampler counts the words of each sequence, for penalties: 612 MiB for 1,024 sequences of 151,936 words.

They were the largest part of an engine's own GPU memory: what a suspend copies to the host, a resume copies back, and a parked engine
holds. Nothing of them has to outlive a sleep: a row is cleared as a request that has penalties takes it, and asleep no request is under
way. So they lie in scratch, like the KV cache. vLLM's second model runner has them; the first counts anew for each token.

Rejected: fewer sequences at once, which is for the user to say; taking them from scratch as they are made, which one version does as it
prepares the device and the next as it loads the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TABLES = ("output_bin_counts", "prompt_bin_mask")


def tables(runner: Any) -> list[Any]:
    """Those of a model runner, as tensors; none where it has no such sampler."""
    state = _state(runner)
    return [table for name in TABLES if (table := getattr(state, name, None)) is not None]


def move(runner: Any, moved: Callable[[Any], Any]) -> None:
    """Puts another tensor in the place of each, made of it by `moved`: zeros, of the same shape and type."""
    state = _state(runner)
    for name in TABLES:
        if (table := getattr(state, name, None)) is not None:
            setattr(state, name, moved(table))


def _state(runner: Any) -> Any:
    return getattr(getattr(runner, "sampler", None), "penalties_state", None)
