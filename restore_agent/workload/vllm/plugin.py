"""What vLLM asks of its plugins, in every process of every vLLM beside which zerowake is installed: so this imports nothing."""

from __future__ import annotations

import os


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`. None, and vLLM stays as it is, where no snapshot of an engine on lent memory is wanted."""
    return "restore_agent.workload.vllm.platform.Platform" if {"GPUMEM_SOCKET", "SNAPSHOT_CONTROL_DIR"} <= os.environ.keys() else None
