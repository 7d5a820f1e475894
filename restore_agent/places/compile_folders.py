"""Where engines keep what they have compiled, by the variables that move those folders.

Downloads lie in other folders (`shared_folders.py`): those travel as weights, or come from where they came from before.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Mapping

_LOGIN = ("LOGNAME", "USER", "LNAME", "USERNAME")  # as Python's getpass asks for the name of a user
_NOT_IN_NAMES = re.compile(r'[\\/:*?"<>|]')  # what TorchInductor replaces in it
_CACHES: Mapping[str, str] = {
    "TORCHINDUCTOR_CACHE_DIR": "",  # below the folder for temporary files: see below
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "VLLM_CACHE_ROOT": "~/.cache/vllm",
    "FLASHINFER_WORKSPACE_BASE": "~/.cache/flashinfer",
    "TVM_FFI_CACHE_DIR": "~/.cache/tvm-ffi",
    "CUDA_CACHE_PATH": "~/.nv/ComputeCache",
}


def compile_folders(env: Mapping[str, str], user: str = "", real: Callable[[str], str] = os.path.realpath) -> dict[str, str]:
    """Variable → real path, there or not, of an engine with this environment that runs as a user of that name (empty: as the agent's own).

    Of two folders of which one is in the other, the outer one counts. `real`: what a path leads to where the engine runs.
    """
    found: dict[str, str] = {}  # real path → the first variable that leads there
    for variable, usual in _CACHES.items():
        path = env.get(variable) or usual
        if variable == "TORCHINDUCTOR_CACHE_DIR" and not path:
            path = f"{env.get('TMPDIR') or '/tmp'}/torchinductor_{_user(env, user)}"
        elif variable == "FLASHINFER_WORKSPACE_BASE" and env.get(variable):
            path = f"{path}/.cache/flashinfer"
        if path.startswith("~"):
            path = f"{env['HOME']}{path[1:]}" if env.get("HOME", "").startswith("/") else ""
        if path.startswith("/"):
            found.setdefault(real(path), variable)
    outer = (path for path in found if path != "/" and not any(path.startswith(f"{other}/") for other in found))
    return {found[path]: path for path in outer}


def _user(env: Mapping[str, str], user: str) -> str:
    name = next((env[each] for each in _LOGIN if env.get(each)), user)
    if not name:
        try:
            name = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:  # a user of no name: torch takes a folder that nobody can foresee
            name = str(os.geteuid())
    return _NOT_IN_NAMES.sub("_", name)
