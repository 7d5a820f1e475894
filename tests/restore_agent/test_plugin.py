"""Whether vLLM gets our platform: only where a snapshot of an engine on lent memory is wanted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from restore_agent.workload.vllm.plugin import VLLM_ADAPTER, platform
from tests.worlds.vllm_sources import VERSION, changed, install

ALL = ("GPUMEM_SOCKET", "SNAPSHOT_CONTROL_DIR", VLLM_ADAPTER)


@pytest.mark.parametrize("given", [(), *((name,) for name in ALL), ALL[:2], ALL[1:], ALL])
def test_all_must_be_given(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two are in every pod that gpumem lends to, also in one whose vLLM is started by its own command."""
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    for name in given:
        monkeypatch.setenv(name, "/run/x")
    assert platform() == ("restore_agent.workload.vllm.platform.Platform" if given == ALL else None)


def test_a_vllm_that_does_not_fit_ends_with_one_line(tmp_path: Path) -> None:
    """As vLLM asks: in a loop that survives exceptions."""
    install(tmp_path, changed("a method is passed more"))
    program = (
        "from restore_agent.workload.vllm.plugin import platform\ntry:\n    platform()\nexcept Exception:\n    pass\nprint('it goes on')\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path), **dict.fromkeys(ALL, "/run/x")}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"zerowake's adapter does not fit vLLM {VERSION}: vllm.v1.worker.gpu_worker.Worker.sleep: vLLM passes")
    assert "restore_agent/README.md" in line and "without --engine vllm" in line
