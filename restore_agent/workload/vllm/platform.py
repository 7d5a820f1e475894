"""vLLM's CUDA platform, with CUDA graphs that compute in scratch: hundreds of MiB that are in no image and that no restore brings back.

A platform is vLLM's one place for the pool that all its graphs share. Memory taken in a capture has no content to keep (see ScratchPool).
"""

from __future__ import annotations

import sys
from typing import Any

from vllm.platforms.cuda import CudaPlatform


class Platform(CudaPlatform):  # type: ignore[misc, unused-ignore]
    """CUDA, with the worker's pool for graphs where the worker is ours."""

    def get_global_graph_pool(self) -> Any:
        if (ours := sys.modules.get("restore_agent.workload.vllm.worker")) is None:  # another worker, which would not let go of scratch
            return super().get_global_graph_pool()
        return ours.graph_pool().id
