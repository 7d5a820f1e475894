"""Whether vLLM gets our platform: only where a snapshot of an engine on lent memory is wanted."""

import pytest

from restore_agent.workload.vllm.plugin import platform


@pytest.mark.parametrize("given", [(), ("GPUMEM_SOCKET",), ("SNAPSHOT_CONTROL_DIR",), ("GPUMEM_SOCKET", "SNAPSHOT_CONTROL_DIR")])
def test_both_must_be_given(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPUMEM_SOCKET", "SNAPSHOT_CONTROL_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in given:
        monkeypatch.setenv(name, "/run/x")
    assert platform() == ("restore_agent.workload.vllm.platform.Platform" if len(given) == 2 else None)
