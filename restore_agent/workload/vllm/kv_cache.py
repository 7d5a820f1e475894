"""How much memory vLLM's KV cache takes: where nobody says so, and by a configuration of vLLM's, in every version that the adapter fits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

USUAL_BYTES = 4 << 30


def longest_request(layers: Iterable[Any], vllm_config: Any) -> int:
    """Bytes of KV cache of one request of the longest that the model takes. `layers`: the `KVCacheSpec` of each."""
    return sum(int(layer.max_memory_usage_bytes(vllm_config)) for layer in layers)


def usual_bytes(longest: int) -> int:
    """Of KV cache, where the command names none: USUAL_BYTES, or room for the longest request, without which vLLM does not start.

    An eighth is added to that, since vLLM fills up where layers of several kinds share its pages.
    """
    return max(USUAL_BYTES, longest + longest // 8)


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
