"""Which processes of SGLang get which of our hooks, and when none does; with an SGLang of the tests', and a torch that is only a name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from restore_agent.workload.sglang.plugin import SGLANG_WEIGHTS, hooks
from tests.worlds.sglang_sources import FILES, VERSION, install

ALL = ("GPUMEM_SOCKET", "SNAPSHOT_CONTROL_DIR", SGLANG_WEIGHTS)
NAME_ONLY = "class nn:\n    class Module: ...\ndef __getattr__(name):\n    return type(name, (), {})\n"
PROGRAM = """
import multiprocessing, sys
def tell(where):
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry
    load_plugins()
    for target, (hook, kind) in HookRegistry._hooks.items():
        import pkgutil
        assert pkgutil.resolve_name(target).__wrapped__, target
        print(where, kind.name, target, hook.__module__.rpartition(".")[2], hook.__name__, flush=True)
def scheduler():
    import sglang.srt.managers.scheduler
    tell("scheduler")
if __name__ == "__main__":
    tell("server")
    spawn = multiprocessing.get_context("spawn")
    for target, args in ((scheduler, ()), (tell, ("detokenizer",))):
        process = spawn.Process(target=target, args=args)
        process.start()
        process.join()
        assert process.exitcode == 0
"""


def run(folder: Path, files: dict[str, str], given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The SGLang of these files asks its plugins in three processes."""
    names = ("torch/__init__", "torch/_subclasses", "torch/overrides", "safetensors/__init__", "safetensors/torch")
    install(folder, {**dict.fromkeys((f"{name}.py" for name in names), NAME_ONLY), **files})
    (folder / "ask.py").write_text(PROGRAM)
    env = {key: value for key, value in os.environ.items() if key not in ALL} | given | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, folder / "ask.py"], env=env, capture_output=True, text=True, check=False, timeout=60)


def all_of(folder: Path) -> dict[str, str]:
    socket = folder / "gpumem.sock"
    socket.touch()
    return dict(zip(ALL, (str(socket), str(folder), str(folder)), strict=True))


def test_each_process_gets_its_hooks(tmp_path: Path) -> None:
    asked = run(tmp_path, FILES, all_of(tmp_path))
    assert asked.returncode == 0, asked.stderr
    where = {"middleware.py": "server", "scheduler.py": "scheduler"}
    expected = {f"{where[each.file]} {each.kind} {each.target} {each.file.removesuffix('.py')} {each.function}" for each in hooks()}
    assert set(asked.stdout.splitlines()) == expected and len(expected) == 4, asked.stderr


@pytest.mark.parametrize("missing", ALL)
def test_nothing_is_hooked_where_something_is_not_given(tmp_path: Path, missing: str) -> None:
    given = {key: value for key, value in all_of(tmp_path).items() if key != missing}
    asked = run(tmp_path, FILES, given)
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "", "")


def test_where_no_gpumem_runs_that_is_said_and_nothing_is_hooked(tmp_path: Path) -> None:
    asked = run(tmp_path, FILES, all_of(tmp_path) | {"GPUMEM_SOCKET": str(tmp_path / "none.sock")})
    assert (asked.returncode, asked.stdout) == (0, "")
    assert f"travel in the image: gpumem does not run at {tmp_path / 'none.sock'}" in asked.stderr


def test_an_sglang_that_does_not_fit_ends_with_one_line(tmp_path: Path) -> None:
    constants = "sglang/srt/constants.py"
    asked = run(tmp_path, {**FILES, constants: FILES[constants].replace("_KV_CACHE", "_CACHE")}, all_of(tmp_path))
    assert (asked.returncode, asked.stdout) == (1, "")
    (line,) = asked.stderr.splitlines()
    assert line.startswith(f"zerowake's adapter does not fit SGLang {VERSION}: sglang.srt.constants has no GPU_MEMORY_TYPE_KV_CACHE")
    assert "restore_agent/README.md" in line and "without zerowake beside SGLang" in line


def test_an_adapter_that_cannot_be_loaded_ends_the_engine_too(tmp_path: Path) -> None:
    """SGLang survives whatever its plugins raise, and would go on with one half of the adapter."""
    asked = run(tmp_path, {**FILES, "torch/overrides.py": "raise OSError('no such library')"}, all_of(tmp_path))
    assert asked.stdout.startswith("server BEFORE") and "\n" not in asked.stdout.rstrip()
    assert asked.returncode == 1 and "cannot be loaded into SGLang's process: OSError: no such library" in asked.stderr
