"""A standby whose engine is stood in for: no process, no GPU, and all that says where it stands."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

from restore_agent.sequences.standby import Rung, Standby
from restore_agent.snapshots.catalog import Snapshot

ONE, TWO = "GPU-1", "GPU-2"


def stood_engine(gpu_bytes: Any = None) -> Any:
    exit_ = asyncio.get_running_loop().create_future()

    async def close() -> None:
        if not exit_.done():
            exit_.set_result(9)

    place = SimpleNamespace(exit_of=lambda pid: exit_, close=close, is_ours=True, gpus=None, written=lambda: "")
    return SimpleNamespace(
        place=place, pid=1, gpu_bytes=gpu_bytes or {}, wake_bytes=dict, output=SimpleNamespace(name="", close=lambda: None)
    )


def waiting(snapshot: Snapshot, rung: Rung, gpus: Any, engine: Any = None) -> Standby:
    engine = engine or stood_engine()
    undo = contextlib.AsyncExitStack()
    undo.push_async_callback(engine.place.close)

    async def let_go() -> None:
        """Nothing holds it."""

    return Standby(snapshot, engine, let_go, undo, [], gpus, (ONE, TWO), rung)
