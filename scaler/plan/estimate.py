"""The one estimate: seconds until a node serves a model from a snapshot. Every placement and staging choice uses it, and nothing else.

    standby:    overhead
    in memory:  overhead + image bytes / fill rate
    on disk:    the same, and image bytes / staging rate before it
    elsewhere:  never (nodes fetch from each other later)

Rates and overhead are the node's own measurements. Until it has made any, the numbers below stand in: rough ones of a small machine, good
enough to prefer memory over disk and disk over nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from zerowake_proto import agent_pb2

_K = TypeVar("_K")
_FILL_RATE = 4e9  # bytes a second
_STAGE_RATE = 1e9
_OVERHEAD_SECONDS = 0.05


def seconds_to_serve(node: agent_pb2.Node, residency: agent_pb2.Residency | None) -> float:
    """Infinite where the snapshot is absent or cannot be restored there."""
    if residency is None or residency.unusable_reason or residency.rung < agent_pb2.RUNG_DISK:
        return math.inf
    overhead = residency.restore_overhead_seconds or _OVERHEAD_SECONDS
    if residency.rung >= agent_pb2.RUNG_STANDBY:
        return overhead
    seconds = overhead + residency.image_bytes / (node.bandwidths.memory_to_process or _FILL_RATE)
    return seconds + (0.0 if residency.rung >= agent_pb2.RUNG_MEMORY else seconds_to_stage(node, residency))


def seconds_to_stage(node: agent_pb2.Node, residency: agent_pb2.Residency) -> float:
    """disk → memory."""
    return residency.image_bytes / (node.bandwidths.disk_to_memory or _STAGE_RATE)


def best(estimates: Mapping[_K, float]) -> _K | None:
    """The key with the smallest finite estimate."""
    key = min(estimates, key=lambda each: estimates[each], default=None)
    return None if key is None or math.isinf(estimates[key]) else key
