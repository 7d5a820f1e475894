"""Ranks of vLLM that would talk in a way that does not come through a dump are refused, and what vLLM would use by itself is turned off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from restore_agent.workload.vllm.collectives import ENVIRONMENT, CannotTalk, restrict, unlike


def config(ranks: int, world: int = 0) -> Any:
    """vLLM's, as far as it is looked at."""
    parallel = SimpleNamespace(tensor_parallel_size=ranks, world_size_across_dp=world or ranks, disable_custom_all_reduce=False)
    passes = SimpleNamespace(fuse_allreduce_rms=True, enable_sp=True, fuse_norm_quant=True)  # one of ours is not in every version
    return SimpleNamespace(parallel_config=parallel, compilation_config=SimpleNamespace(pass_config=passes))


def test_what_talks_by_peer_memory_is_turned_off_where_there_are_several_ranks() -> None:
    several, one = config(2), config(1)
    restrict(several, ENVIRONMENT)
    restrict(one, {})
    passes = several.compilation_config.pass_config
    assert several.parallel_config.disable_custom_all_reduce is True
    assert (passes.fuse_allreduce_rms, passes.enable_sp, passes.fuse_norm_quant) == (False, False, True)
    assert not hasattr(passes, "fuse_gemm_comms")
    assert one == config(1)


def test_ranks_that_the_command_line_did_not_name_are_refused_with_what_to_do() -> None:
    with pytest.raises(CannotTalk, match=r"2 ranks need NCCL_P2P_DISABLE=1 in their environment .* say --tensor-parallel-size on the"):
        restrict(config(2), {})
    with pytest.raises(CannotTalk, match=r"need NCCL_IB_DISABLE=1 "):
        restrict(config(4), {**ENVIRONMENT, "NCCL_IB_DISABLE": "0"})


def test_other_parallelism_is_refused() -> None:
    with pytest.raises(CannotTalk, match=r"tensor parallel alone"):
        restrict(config(2, world=4), ENVIRONMENT)


def test_the_first_variable_that_says_something_else_is_named() -> None:
    assert unlike(ENVIRONMENT) == ""
    assert unlike({**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"}) == "GLOO_SOCKET_IFNAME=lo"
