"""A rank on a GPU of its own, with the adapter's kernel over memory that gpumem lends: `python -m tests.worlds.gpu_rank SOCKET RANK RANKS`.

It takes orders as JSON lines, `[name, arguments]`, and answers each with one. What it sums and gathers is captured in a CUDA graph.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from gpumem.client import Client
from restore_agent.workload.vllm.collective_call import Call
from restore_agent.workload.vllm.collective_kernel import Arguments, Kernel
from restore_agent.workload.vllm.peer_memory import Collectives, PeerMemory

LOOPS = 200


class Rank:
    def __init__(self, socket: str, rank: int, ranks: int) -> None:
        torch.cuda.set_device(rank)
        self._rank, self._ranks = rank, ranks
        self._client = Client(socket, device=f"GPU-{torch.cuda.get_device_properties(rank).uuid}", label=f"rank {rank}")
        self._graphs: dict[str, tuple[Any, tuple[int, Any, Any]]] = {}

    def lend(self, meeting: str) -> str:
        self._client.meet(meeting.encode())
        self._memory = PeerMemory(self._client, self._rank)
        self._kernel = Kernel(torch.cuda.get_device_capability())
        return self._client.device

    def join(self, devices: list[str]) -> None:
        self._memory.join(devices)
        self._collectives = Collectives(self._memory.addresses, self._rank, self._launch)

    def eager(self, size: int) -> bool:
        """Whether a sum and a gather are right."""
        return self._right(size, *self._calls(size))

    def capture(self, name: str, size: int) -> None:
        do, *rest = self._calls(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            do()
        self._graphs[name] = graph, (size, do, rest)  # `do` has what is summed, whose memory the graph reads

    def replay(self, name: str) -> bool:
        graph, (size, _, rest) = self._graphs[name]
        return self._right(size, graph.replay, *rest)

    def seconds(self, size: int) -> float:
        """Of one sum in a graph, of many in a row."""
        part = torch.ones(size // 2, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(part)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(LOOPS):
                self._collectives.sum(part.data_ptr(), out.data_ptr(), size, "bfloat16")
        for _ in range(2):
            began = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / LOOPS

    def quiesce(self) -> None:
        torch.cuda.synchronize()
        self._client.quiesce()

    def resume(self, meeting: str) -> None:
        self._client.resume(meeting=meeting.encode())

    def _launch(self, call: Call, arguments: Arguments) -> None:
        self._kernel.launch(call, arguments, torch.cuda.current_stream().cuda_stream)

    def _parts(self, size: int) -> list[Any]:
        """Numbers that any order of adding gives exactly."""
        return [torch.arange(size // 2, device="cuda").add(each).remainder(13).sub(6).to(torch.bfloat16) for each in range(self._ranks)]

    def _calls(self, size: int) -> tuple[Callable[[], None], Any, Any]:
        mine = self._parts(size)[self._rank]
        total, everyone = torch.zeros_like(mine), torch.zeros((self._ranks, size // 2), device="cuda", dtype=torch.bfloat16)

        def do() -> None:
            assert self._collectives.sum(mine.data_ptr(), total.data_ptr(), size, "bfloat16")
            assert self._collectives.gather(mine.data_ptr(), everyone.data_ptr(), size)

        return do, total, everyone

    def _right(self, size: int, do: Callable[[], None], total: Any, everyone: Any) -> bool:
        total.zero_()
        everyone.zero_()
        do()
        torch.cuda.synchronize()
        parts = torch.stack(self._parts(size))
        return torch.equal(total, parts.float().sum(0).to(torch.bfloat16)) and torch.equal(everyone, parts)


def main() -> None:
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        rank = Rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        answers.write('"ready"\n')
        for line in sys.stdin:
            order, arguments = json.loads(line)
            answers.write(json.dumps(getattr(rank, order)(*arguments)) + "\n")


if __name__ == "__main__":
    main()
