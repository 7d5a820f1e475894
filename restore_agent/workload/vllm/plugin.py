"""What vLLM asks of its plugins, in every process of every vLLM beside which zerowake is installed: so this imports next to nothing."""

from __future__ import annotations

import os

VLLM_ADAPTER = "ZEROWAKE_VLLM"  # its command has the adapter's options, which a vLLM that is started cold in a pod has not


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`. None, and vLLM stays as it is, where no snapshot of an engine on lent memory is wanted.

    Raises:
        SystemExit: this vLLM is one that the adapter does not fit; of all that it could do, ending with one line says most.
    """
    if not {"GPUMEM_SOCKET", "SNAPSHOT_CONTROL_DIR", VLLM_ADAPTER} <= os.environ.keys():
        return None
    from restore_agent.workload.vllm import fitting  # noqa: PLC0415 - of no use to any other vLLM

    version, misfits = fitting.installed()
    if misfits:
        more = f" (and {len(misfits) - 1} more)" if misfits[1:] else ""
        raise SystemExit(
            f"zerowake's adapter does not fit vLLM {version}: {misfits[0]}{more}. Use a vLLM that it fits "
            f"(restore_agent/README.md names them), or take the snapshot without --engine vllm; of a pod, with the annotation "
            f'zerowake.dev/gpumem: "false" in its template.'
        )
    return "restore_agent.workload.vllm.platform.Platform"
