"""SGLang's API server in the control directory. Its scheduler, a process of its own, has the GPU (scheduler.py).

    API server   waits for the requests under way, and lets no other through ── flush the cache, release memory ──► scheduler
    API server   lets requests through again ◄── all is back at its addresses ── resume memory ──► scheduler

The lock is SGLang's own, which its updates of weights take: who asks meanwhile waits in the API server, before anything of the request is
tokenized. Flushing comes first and waits until the scheduler is idle: it answers a request before it has put its batch away, and
asserts that it is idle when it is to release memory. Rejected: its `pause_generation`, which keeps requests in the scheduler, half done.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus

from restore_agent.workload import middleware

_IDLE_SECONDS = 30.0  # that the scheduler may take to put its last batch away


class Snapshots(middleware.Snapshots):
    """The middleware, with SGLang's tokenizer manager, which speaks with the scheduler."""

    log = logging.getLogger("sglang.zerowake")

    @property
    def _manager(self) -> Any:
        return http_server.get_global_state().tokenizer_manager

    async def fall_asleep(self) -> None:
        await self._manager.model_update_lock.acquire_writer()
        flushed = await self._manager.flush_cache(timeout_s=_IDLE_SECONDS)
        if not flushed.success:
            raise RuntimeError(
                f"SGLang's scheduler is not idle after {_IDLE_SECONDS:.0f} s, so its memory cannot be let go of: {flushed.message}"
            )
        await self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=[GPU_MEMORY_TYPE_KV_CACHE]))

    async def wake(self, moved: Mapping[str, str]) -> None:
        """The scheduler looks for `moved` itself, in the control directory."""
        await self._manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=[GPU_MEMORY_TYPE_KV_CACHE]))
        await self._manager.model_update_lock.release_writer()


def launching(*arguments: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before `launch_server`: what it is passed."""
    http_server.app.add_middleware(Snapshots)
    return arguments, {**named, "execute_warmup_func": no_warm_up}


def no_warm_up(server_args: Any) -> bool:
    """In place of SGLang's, which asks over HTTP, and would be refused until the engine is offered: the middleware warms it up."""
    http_server.get_global_state().tokenizer_manager.server_status = ServerStatus.Up
    return True
