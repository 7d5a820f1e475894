"""How much memory vLLM will ask for its KV cache: what a configuration of its says, in every version that the adapter fits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def allocations(tensors: Iterable[Any]) -> list[int]:
    """The sizes of the memories that vLLM will take for these `KVCacheTensor`s, in bytes.

    One that has a `block_stride` (all do from vLLM 0.29 on, those of packed layouts from 0.24 on) is a place in a memory that it shares
    with the others, and says how large that is; any other has a memory to itself.
    """
    found, shared = [], set()
    for tensor in tensors:
        if getattr(tensor, "block_stride", 0):
            shared.add(tensor.size)
        else:
            found.append(tensor.size)
    return [*found, *sorted(shared)]
