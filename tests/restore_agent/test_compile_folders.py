"""Where an engine keeps what it has compiled, by its environment."""

from __future__ import annotations

import os
from pathlib import Path

from restore_agent.places.compile_folders import compile_folders


def test_the_usual_folders_are_below_home_and_the_folder_for_temporary_files(tmp_path: Path) -> None:
    home = str(tmp_path)
    assert compile_folders({"HOME": home, "TMPDIR": f"{home}/tmp", "USER": "a/b"}) == {
        "TORCHINDUCTOR_CACHE_DIR": f"{home}/tmp/torchinductor_a_b",
        "TRITON_CACHE_DIR": f"{home}/.triton/cache",
        "VLLM_CACHE_ROOT": f"{home}/.cache/vllm",
        "FLASHINFER_WORKSPACE_BASE": f"{home}/.cache/flashinfer",
        "TVM_FFI_CACHE_DIR": f"{home}/.cache/tvm-ffi",
        "CUDA_CACHE_PATH": f"{home}/.nv/ComputeCache",
    }


def test_variables_move_them_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    env = {"VLLM_CACHE_ROOT": f"{tmp_path}/link", "FLASHINFER_WORKSPACE_BASE": "/base", "TORCHINDUCTOR_CACHE_DIR": "/inductor"}
    assert compile_folders(env) == {
        "TORCHINDUCTOR_CACHE_DIR": "/inductor",
        "VLLM_CACHE_ROOT": f"{tmp_path}/real",
        "FLASHINFER_WORKSPACE_BASE": "/base/.cache/flashinfer",
    }, "without a home the others are nowhere"


def test_in_a_container_its_user_counts_and_no_link_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    env = {"TRITON_CACHE_DIR": f"{tmp_path}/link/../kernels"}
    assert compile_folders(env, "engineer", os.path.normpath) == {
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor_engineer",
        "TRITON_CACHE_DIR": f"{tmp_path}/kernels",
    }


def test_one_in_another_and_one_folder_twice_are_one_cache() -> None:
    env = {"TORCHINDUCTOR_CACHE_DIR": "/c/vllm/inductor", "VLLM_CACHE_ROOT": "/c/vllm", "TRITON_CACHE_DIR": "/t", "CUDA_CACHE_PATH": "/t"}
    assert compile_folders(env) == {"VLLM_CACHE_ROOT": "/c/vllm", "TRITON_CACHE_DIR": "/t"}
    assert "TRITON_CACHE_DIR" not in compile_folders({"TRITON_CACHE_DIR": "/"}), "never the whole machine"
