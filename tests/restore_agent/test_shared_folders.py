"""Which folders stay the machine's: those that are named, and where engines keep what they download."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.places.place import PlaceError
from restore_agent.places.shared_folders import caches, resolved, unshared


def test_the_hub_is_shared_always_and_other_caches_where_they_are(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    assert caches(env) == [f"{tmp_path}/.cache/huggingface"]
    (tmp_path / ".triton/cache").mkdir(parents=True)
    (tmp_path / ".cache/other").mkdir(parents=True)
    assert caches(env) == [f"{tmp_path}/.cache/huggingface", f"{tmp_path}/.triton/cache"]
    assert caches(env | {"HF_HOME": "/models", "VLLM_CACHE_ROOT": "/compiled"}) == ["/models", f"{tmp_path}/.triton/cache", "/compiled"]
    kernels = {"HF_HOME": "/models", "TVM_FFI_CACHE_DIR": "/tvm", "FLASHINFER_WORKSPACE_BASE": "/flashinfer"}
    assert caches(kernels) == ["/models", "/flashinfer", "/tvm"], "SGLang compiles kernels as it starts"
    assert caches({}) == []


def test_folders_are_made_and_named_by_their_real_paths(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "logs")
    made = resolved([f"{tmp_path}/link/deep", f"{tmp_path}/logs", f"{tmp_path}/logs-too"])
    assert made == (f"{tmp_path}/logs", f"{tmp_path}/logs-too"), "what is in another is shared with it"
    assert (tmp_path / "logs/deep").is_dir()
    assert unshared([f"{tmp_path}/link/deep", f"{tmp_path}/logs-other"], made) == [f"{tmp_path}/logs-other"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("logs", "no absolute path"),
        ("/", "name the folder in it"),
        ("/dev/shm", "name the folder in it"),
        ("/proc/self", "name the folder in it"),
        ("/etc/passwd", "is a file; name its folder"),
        ("/etc/passwd/logs", "cannot be made: Not a directory"),
    ],
)
def test_what_cannot_be_shared(name: str, why: str) -> None:
    with pytest.raises(PlaceError, match=why):
        resolved([name])
