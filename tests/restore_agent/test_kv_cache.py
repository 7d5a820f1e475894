"""How much memory a KV cache takes, by what vLLM says of it in its versions; tests/engines/ asks vLLM's own code."""

from types import SimpleNamespace

import pytest

from restore_agent.workload.vllm.kv_cache import USUAL_BYTES, allocations, longest_request, usual_bytes


def tensor(size: int, **more: int) -> SimpleNamespace:
    return SimpleNamespace(size=size, **more)


@pytest.mark.parametrize(
    ("tensors", "sizes"),
    [
        ([], []),
        ([tensor(4), tensor(4)], [4, 4]),  # vLLM 0.23: each has a memory of its own
        ([tensor(4, block_stride=0), tensor(6, block_stride=0)], [4, 6]),  # 0.24 to 0.28
        ([tensor(10, block_stride=2), tensor(10, block_stride=2)], [10]),  # packed; every one from 0.29 on
    ],
)
def test_what_is_shared_is_taken_once(tensors: list[SimpleNamespace], sizes: list[int]) -> None:
    assert allocations(tensors) == sizes


def test_a_cache_that_nobody_asked_for_takes_the_longest_request() -> None:
    """Qwen3-8B's, of 40,960 tokens: 4 KiB for each token and layer. vLLM 0.23 refused to start with 4 GiB."""
    layers = [SimpleNamespace(max_memory_usage_bytes=lambda config: config.tokens << 12)] * 36
    longest = longest_request(layers, SimpleNamespace(tokens=40_960))
    assert longest == 36 * 40_960 << 12 == 6_039_797_760
    assert longest < usual_bytes(longest) < longest * 1.2
    assert usual_bytes(longest_request(layers, SimpleNamespace(tokens=8192))) == USUAL_BYTES
