"""What SGLang asks of its plugins, in its processes, wherever zerowake is installed beside it: so this imports next to nothing.

SGLang lets a plugin hook its functions by name (`sglang.srt.plugins`), which is all that this adapter builds on:

    process           hook                                    for what
    API server        http_server.launch_server               the middleware (middleware.py); SGLang's own warm-up is left to it
    scheduler         TorchMemorySaverAdapter.create          KV cache in scratch; `pause` and `resume` let go of all and take it back
    scheduler         model_loader.loader.get_model_loader    weights are published, or mapped, instead of loaded
    scheduler         ModelRunner.init_attention_backends     CUDA graphs compute in scratch

Rejected: SGLang's own memory saver (the package torch_memory_saver), which keeps what it lets go of in the host's memory or loses it, and
is preloaded as a library; a module of ours under that package's name, which would learn of memory, but not of the model that lies in it;
`--load-format`, which takes no name of ours. None of this needs an option of SGLang's, so that its command works without the adapter.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from restore_agent.workload.fitting import Adapter, Hook

SGLANG_WEIGHTS = "ZEROWAKE_SGLANG_WEIGHTS"  # where weights are kept as engines map them; where it is not set, SGLang stays as it is
FILES = ("scheduler.py", "middleware.py")
_SCHEDULER = "sglang.srt.managers.scheduler"  # who has it imported when plugins are asked for is one, or may become one
_log = logging.getLogger("sglang.zerowake")


def register() -> None:
    """Entry point `sglang.srt.plugins`. Nothing happens where no snapshot of an engine on lent memory is wanted, or nobody lends.

    Raises:
        SystemExit: this SGLang is one that the adapter does not fit, or cannot be loaded into; of all that it could do, ending with one
            line says most.
    """
    if not {"GPUMEM_SOCKET", "SNAPSHOT_CONTROL_DIR", SGLANG_WEIGHTS} <= os.environ.keys():
        return
    if why := _nothing_is_lent():
        _log.warning("weights and KV cache travel in the image: %s", why)
        return
    from restore_agent.workload.fitting import refusal  # noqa: PLC0415 - of no use to any other SGLang

    if refused := refusal(
        adapter(),
        "take the snapshot without zerowake beside SGLang, and weights and KV cache travel in it; of a pod, with the annotation "
        'zerowake.dev/gpumem: "false" in its template',
    ):
        raise SystemExit(refused)
    try:
        if multiprocessing.parent_process() is None:
            _hook("middleware.py")
        elif _SCHEDULER in sys.modules:
            _hook("scheduler.py")
    except Exception as error:  # which SGLang would survive, with one half of the adapter
        raise SystemExit(f"zerowake's adapter cannot be loaded into SGLang's process: {type(error).__name__}: {error}") from error


def adapter() -> Adapter:
    """What is compared with SGLang's sources."""
    from restore_agent.workload.fitting import Adapter  # noqa: PLC0415 - of no use to any other SGLang

    return Adapter("SGLang", "sglang", Path(__file__).parent, FILES, hooks=hooks())


def hooks() -> tuple[Hook, ...]:
    """What is hooked, by which function of ours."""
    from restore_agent.workload.fitting import Hook  # noqa: PLC0415 - of no use to any other SGLang

    memory_saver = "sglang.srt.utils.torch_memory_saver_adapter.TorchMemorySaverAdapter"
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    return (
        Hook("sglang.srt.entrypoints.http_server.launch_server", "BEFORE", "middleware.py", "launching"),
        Hook(f"{memory_saver}.create", "REPLACE", "scheduler.py", "memory_saver"),
        Hook("sglang.srt.model_loader.loader.get_model_loader", "AFTER", "scheduler.py", "lending_loader"),
        Hook(f"{runner}.init_attention_backends", "AFTER", "scheduler.py", "graphs_in_scratch"),
    )


def _nothing_is_lent() -> str:
    """Why; empty: it is."""
    if not Path(os.environ["GPUMEM_SOCKET"]).exists():
        return f"gpumem does not run at {os.environ['GPUMEM_SOCKET']}"
    if find_spec("blake3") is None:
        return "weights are hashed with blake3 to be lent, which is not installed here: pip install blake3"
    return ""


def _hook(file: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415 - a plugin has it at hand

    ours = importlib.import_module(f"{__package__}.{file.removesuffix('.py')}")
    for hook in hooks():
        if hook.file == file:
            HookRegistry.register(hook.target, getattr(ours, hook.function), HookType[hook.kind])
