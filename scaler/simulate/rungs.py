"""How many seconds a scale-up takes from each rung: by the product's own estimate (scaler/plan/estimate.py), on a node with given rates.

Weights on the GPU and the image in memory: overhead + fill. In host memory: the weights' way to the GPU beside the fill. On disk: the
disk's rate, and so on. What came of measurements (tests/bench/results) are the defaults: vLLM with an 8B model takes 0.62 s with its
weights on the GPU, 0.66 from host memory, 0.36 as a standby, 0.04 parked.
"""

from __future__ import annotations

from functools import cache

from scaler.plan.estimate import seconds_to_serve
from scaler.plan.rungs import Rung, WeightsRung
from scaler.plan.world import Gpu, Node, Rates, Residency

NAMES = ("parked", "gpu", "host", "peer", "disk", "remote")
IN_MEMORY = ("parked", "gpu", "host")  # of the very node
_AMPLE = 1 << 62


class Rungs:
    """Rates in bytes a second, overheads in seconds. parked: idle weights on a GPU have their process there, too, parked, which takes
    parked_bytes of it; a model in host memory is a standby then.
    """

    def __init__(
        self,
        *,
        disk: float,
        peer: float,
        store: float,
        pinned: float,
        overhead: float,
        fill_seconds: float,
        parked_overhead: float,
        parked_bytes: float = 0.0,
        stored_only: bool = False,
    ) -> None:
        self.parked_bytes = parked_bytes
        self._parked = parked_bytes > 0
        self._rates = {"disk": disk, "peer": peer, "remote": store if stored_only else min(peer, disk)}
        self._pinned, self._overhead, self._parked_overhead = pinned, overhead, parked_overhead
        self._image = round(fill_seconds * 1e9)
        self.gpu = NAMES.index("parked" if self._parked else "gpu")
        self.host, self.peer, self.disk, self.remote = (NAMES.index(name) for name in ("host", "peer", "disk", "remote"))

    def reading(self, rung: int, size: float) -> float:
        """Seconds in which that many bytes come from a disk, a peer's memory or a store."""
        return size / self._rates[NAMES[rung]]

    def seconds_after(self, wait: float, size: float) -> float:
        """To serve when the rest of the weights will be in host memory after so many seconds, and goes on to the GPU meanwhile."""
        return max(self.seconds(self.host, size), self._overhead + wait)

    @cache  # noqa: B019 - lives as long as the run
    def seconds(self, rung: int, size: float) -> float:
        """To serve, by the estimate of the plan. size: bytes of the weights."""
        name = NAMES[rung]
        weights = {"parked": WeightsRung.GPU, "gpu": WeightsRung.GPU, "host": WeightsRung.MEMORY}.get(name, WeightsRung.DISK)
        image = Rung.PARKED if name == "parked" else Rung.STANDBY if self._parked and name == "host" else Rung.MEMORY
        rate = self._rates.get(name, 0.0)
        gpu = Gpu("gpu", total_bytes=_AMPLE, free_bytes=_AMPLE)
        rates = Rates(memory_to_process=1e9, memory_to_gpu=self._pinned, disk_to_gpu=rate, disk_to_memory=rate)
        node = Node("node", "node", synced=True, gpus=(gpu,), memory_total_bytes=_AMPLE, memory_free_bytes=_AMPLE, rates=rates)
        there = Residency(
            "model",
            image,
            image_bytes=self._image,
            weights_bytes=round(size),
            weights_rung=weights,
            gpu_bytes=(round(size),),
            parked_bytes=(round(size),) if image is Rung.PARKED else (),
            overhead_seconds=self._overhead,
            parked_overhead_seconds=self._parked_overhead,
        )
        return seconds_to_serve(node, there)
