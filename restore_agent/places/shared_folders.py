"""Folders of the machine that a sandbox does not lay its own layer over: what an engine writes there, everybody reads.

The user names them (`--shared`, `shared:`). By themselves come those in which engines keep what they downloaded or compiled, where the
machine has them: they are made for several processes at once, outlive each of them, and are too large to be in a snapshot. The hub of
Hugging Face is there always, since the first engine to download a model fills it with gigabytes that the second must find. Whatever else
lies in ~/.cache is private, as every other folder: programs put sockets and locks there, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from restore_agent.places.place import PlaceError

_HUB = "HF_HOME"
# Variables that move such a folder, and where it is without them.
_CACHES: Mapping[str, str] = {
    _HUB: "~/.cache/huggingface",
    "HF_HUB_CACHE": "",
    "MODELSCOPE_CACHE": "~/.cache/modelscope",
    "LLAMA_CACHE": "~/.cache/llama.cpp",
    "TORCH_HOME": "~/.cache/torch",
    "TORCHINDUCTOR_CACHE_DIR": "",
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "VLLM_CACHE_ROOT": "~/.cache/vllm",
    "FLASHINFER_WORKSPACE_BASE": "~/.cache/flashinfer",
    "TVM_FFI_CACHE_DIR": "~/.cache/tvm-ffi",  # SGLang's kernels
    "CUDA_CACHE_PATH": "~/.nv/ComputeCache",
}
_NEVER = ("/", "/proc", "/sys", "/dev", "/dev/shm", "/run", "/run/zerowake")


def caches(env: Mapping[str, str]) -> list[str]:
    """Of an engine with this environment."""
    home, found = env.get("HOME", ""), []
    for variable, usual in _CACHES.items():
        path = env.get(variable) or usual
        if path.startswith("~"):
            path = f"{home}{path[1:]}" if home.startswith("/") else ""
        # A folder that a variable names is wanted; of the others only the hub is made where there is none.
        if path.startswith("/") and (variable == _HUB or variable in env or Path(path).is_dir()):
            found.append(path)
    return found


def resolved(named: Iterable[str]) -> tuple[str, ...]:
    """These folders by their real paths, outermost only; those that are missing are made.

    Raises:
        PlaceError: one is no absolute path, is no folder, cannot be made, or is one that no sandbox can share.
    """
    found = set()
    for name in named:
        if not name.startswith("/"):
            raise PlaceError(f"shared folder {name!r} is no absolute path")
        path = os.path.realpath(name)
        if path in _NEVER or path.startswith(("/proc/", "/sys/", "/run/zerowake/")):
            raise PlaceError(f"{name} cannot be shared: name the folder in it that the engine writes into")
        try:
            if not Path(path).is_socket():  # gpumem's, which the agent names
                Path(path).mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise PlaceError(f"shared folder {name} is a file; name its folder") from None
        except OSError as error:
            raise PlaceError(f"shared folder {name} is missing and cannot be made: {error.strerror}") from None
        found.add(path)
    return tuple(sorted(path for path in found if not any(path.startswith(f"{other}/") for other in found)))


def unshared(named: Iterable[str], shared: Iterable[str]) -> list[str]:
    """Those of `named` that are in none of `shared`, which are real paths."""
    folders = tuple(f"{path}/" for path in shared)
    return [name for name in named if not f"{os.path.realpath(name)}/".startswith(folders)]
