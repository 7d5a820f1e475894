"""How the ranks of one engine talk to each other, so that they can be suspended, dumped and restored with their communicators alive.

CUDA's checkpoint takes no memory that another process lends by CUDA's own means: IPC handles, peer mappings, multicast. NCCL over plain
shared memory of the host has none of it, and came through suspend, dump and restore (tests/bench/README.md, "Two H200s"); so all that NCCL
or vLLM would rather use is turned off, and what has to be fast is ours (all_reduce.py). NCCL's sockets are between addresses that every
place has, since a restored rank goes on with them. Rejected: destroying NCCL before a dump and making it anew after. CUDA graphs have its
kernels in them, with its addresses, and to capture them anew takes longer than all the rest of a restore.

This file is read by the agent as well, and imports nothing of vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the environment of an engine with several ranks has to say.
ENVIRONMENT: Mapping[str, str] = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_CUMEM_HOST_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_IB_DISABLE": "1",  # its descriptors are devices'
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    # It aborts a process whose clock went on while it stood still.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
}
_PASSES = ("fuse_allreduce_rms", "enable_sp", "fuse_gemm_comms")  # of vLLM's compiler, which talk by FlashInfer's or torch's peer memory


class CannotTalk(ValueError):
    """Ranks would talk in a way that does not come through a dump."""


def unlike(environment: Mapping[str, str]) -> str:
    """The first variable that says something else, as it should be; empty: all are as they have to be."""
    return next((f"{name}={value}" for name, value in ENVIRONMENT.items() if environment.get(name) != value), "")


def restrict(vllm_config: Any, environment: Mapping[str, str]) -> None:
    """Before a rank connects to the others: takes what would not come through a dump out of vLLM's configuration.

    Raises:
        CannotTalk: it is parallel in a way that was not said on the command line, or that zerowake does not know.
    """
    parallel = vllm_config.parallel_config
    if parallel.world_size_across_dp > parallel.tensor_parallel_size:
        raise CannotTalk("zerowake's adapter takes engines that are tensor parallel alone: no pipeline, data or context parallelism")
    if parallel.tensor_parallel_size == 1:
        return
    if wrong := unlike(environment):
        raise CannotTalk(
            f"{parallel.tensor_parallel_size} ranks need {wrong} in their environment to be dumped: say --tensor-parallel-size on the "
            "command line, and not in a file, and `--engine vllm` sets it; or set it, where the environment says otherwise"
        )
    parallel.disable_custom_all_reduce = True
    passes = vllm_config.compilation_config.pass_config
    for name in _PASSES:
        if hasattr(passes, name):
            setattr(passes, name, False)
