"""Clients: `Client` for an engine, `gpumem.client.torch` for its modules, `gpumem.client.control` for whoever fills and looks.

Public names are imported when they are first asked for: whoever imports one of the three loads nothing of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpumem.client.client import Client
    from gpumem.client.ranges import Joined, Region, Scratch
    from gpumem.hardware.memory import MemoryFailed
    from gpumem.wire.errors import GpumemError, StaleLayout

__all__ = ["Client", "GpumemError", "Joined", "MemoryFailed", "Region", "Scratch", "StaleLayout"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpumem.client import client, ranges  # noqa: PLC0415
    from gpumem.hardware import memory  # noqa: PLC0415
    from gpumem.wire import errors  # noqa: PLC0415

    return next(getattr(module, name) for module in (client, ranges, memory, errors) if hasattr(module, name))
