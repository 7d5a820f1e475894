"""vLLM's API server in the control directory: `--middleware restore_agent.workload.vllm.middleware.Snapshots`.

Rejected: `/sleep` and `/wake_up` over HTTP, which only a development mode serves, to anyone. vLLM queues what comes while it sleeps.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from restore_agent.workload import middleware


class Snapshots(middleware.Snapshots):
    """The middleware, with vLLM's engine client: what it is told reaches the worker by EngineCore."""

    log = logging.getLogger("vllm.zerowake")
    _ranks = 1

    @property
    def _engine(self) -> Any:
        return self.scope["app"].state.engine_client

    async def checkpoints(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = await self._engine.collective_rpc("checkpoints")
        self._ranks = len(found)
        return found

    async def renew_others(self) -> None:
        await self._engine.collective_rpc("renew")

    async def fall_asleep(self) -> None:
        await self._engine.sleep(level=2, mode="wait")

    async def wake(self, moved: Mapping[str, str]) -> None:
        if moved or self._ranks > 1:
            # Ranks find each other's memory by what those of no other replica are told, were it restored from the same image.
            await self._engine.collective_rpc("move", args=(dict(moved), secrets.token_hex(32)))
        await self._engine.wake_up()
