"""What several ranks are told, against every released vLLM: where it looks for that, and that it does what it says."""

from __future__ import annotations

import ast

import pytest

from restore_agent.workload.vllm import collectives
from tests.engines.releases import Release


def plain(release: Release, file: str) -> str:
    """A file's source in one form, whatever its spaces and quotes."""
    return ast.unparse(ast.parse(release.text(file)))


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        # The worker asks after ours has told it; without it there is no memory that CUDA's IPC lends.
        ("vllm/v1/worker/gpu_worker.py", "set_custom_all_reduce(not parallel_config.disable_custom_all_reduce)"),
        ("vllm/distributed/device_communicators/cuda_communicator.py", "use_torch_symm_mem = envs.VLLM_ALLREDUCE_USE_SYMM_MEM"),
        ("vllm/distributed/device_communicators/cuda_communicator.py", "use_flashinfer_allreduce = envs.VLLM_ALLREDUCE_USE_FLASHINFER"),
        ("vllm/config/parallel.py", "def world_size_across_dp("),
        ("vllm/config/parallel.py", "tensor_parallel_size: int"),
        ("vllm/config/compilation.py", "pass_config: PassConfig"),
        # Ours is in the place of these two methods of the communicator's.
        ("vllm/distributed/parallel_state.py", "return self.device_communicator.all_reduce(input_)"),
        ("vllm/distributed/parallel_state.py", "return self.device_communicator.all_gather(input_, dim)"),
        ("vllm/distributed/device_communicators/base_device_communicator.py", "def all_gather(self, input_: torch.Tensor, dim: int=-1)"),
        # Passes are taken from the worker's configuration when it compiles.
        ("vllm/compilation/passes/pass_manager.py", "self.pass_config.fuse_allreduce_rms"),
    ],
)
def test_ranks_do_as_they_are_told(vllm: Release, file: str, wanted: str) -> None:
    obeys = wanted in plain(vllm, file)
    assert obeys, f"{vllm}: {file} does not say `{wanted}`"


def test_each_pass_that_is_turned_off_is_one_of_some_version_s(vllm: Release) -> None:
    fields = {
        node.target.id
        for each in ast.walk(ast.parse(vllm.text("vllm/config/compilation.py")))
        if isinstance(each, ast.ClassDef) and each.name == "PassConfig"
        for node in each.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and ast.unparse(node.annotation) == "bool"
    }
    assert "fuse_allreduce_rms" in fields & set(collectives._PASSES), f"{vllm}: its passes are {fields}"
    talking = {name for name in fields if any(word in name for word in ("comm", "allreduce", "all_reduce", "gather", "scatter"))}
    assert talking <= set(collectives._PASSES), f"{vllm}: {talking} may talk between ranks"
