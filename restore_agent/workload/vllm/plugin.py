"""What vLLM asks of its plugins, in every process of every vLLM beside which zerowake is installed: so this imports next to nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from restore_agent.workload.fitting import Adapter

VLLM_ADAPTER = "ZEROWAKE_VLLM"  # its command has the adapter's options, which a vLLM that is started cold in a pod has not
FILES = ("worker.py", "platform.py", "all_reduce.py")
TOLD = frozenset({"checkpoints", "move", "renew"})  # what middleware.py has the worker do, which are vLLM's words nowhere


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`. None, and vLLM stays as it is, where no snapshot of an engine on lent memory is wanted.

    Raises:
        SystemExit: this vLLM is one that the adapter does not fit; of all that it could do, ending with one line says most.
    """
    if not {"GPUMEM_SOCKET", "SNAPSHOT_CONTROL_DIR", VLLM_ADAPTER} <= os.environ.keys():
        return None
    from restore_agent.workload.fitting import refusal  # noqa: PLC0415 - of no use to any other vLLM

    if refused := refusal(
        adapter(),
        'take the snapshot without --engine vllm; of a pod, with the annotation zerowake.dev/gpumem: "false" in its template',
    ):
        raise SystemExit(refused)
    return "restore_agent.workload.vllm.platform.Platform"


def adapter() -> Adapter:
    """What is compared with vLLM's sources."""
    from restore_agent.workload.fitting import Adapter  # noqa: PLC0415 - of no use to any other vLLM

    return Adapter("vLLM", "vllm", Path(__file__).parent, FILES, TOLD)
