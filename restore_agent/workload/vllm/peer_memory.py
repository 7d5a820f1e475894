"""Memory that every rank of an engine lends from gpumem, and all of them map: what all_reduce.cu's kernel works in.

Each rank's own lies on its GPU; the others map it by the same kind of descriptor by which they map weights. Unlike CUDA's IPC handles and
peer mappings it is let go of before a dump and taken again after a restore, at the same addresses, so that whatever has these addresses in
it, as CUDA graphs have, goes on. Rejected: vLLM's own all-reduce over such memory: it wants the addresses of captured tensors exchanged by
IPC handles, which this memory has none of, and keeps them in a table whose form is its compiled code's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gpumem.client import Client, Joined, Scratch
from restore_agent.workload.vllm.collective_call import HALF, HEADER, LINES, Call, gathers, sums
from restore_agent.workload.vllm.collective_kernel import Arguments

Launch = Callable[[Call, Arguments], None]  # on whichever stream is current


class PeerMemory:
    """All ranks' memories, as one of them has mapped them. The client must have met the others (`Client.meet`)."""

    def __init__(self, client: Client, rank: int) -> None:
        """Lends this rank's own. Raises what `Client.scratch` does."""
        self._client = client
        self._rank = rank
        self._ranges: list[Scratch | Joined] = [client.scratch(HEADER + 2 * HALF + LINES, _name(rank))]
        self.addresses: list[int] = []  # by rank

    def join(self, devices: Sequence[str]) -> None:
        """Maps the others', when each has its own. `devices`: of each rank. Raises what `Client.join` does."""
        own = self._ranges[0]
        for rank, device in enumerate(devices):
            if rank != self._rank:
                self._ranges.append(self._client.join(_name(rank), device))
        others = iter(self._ranges[1:])
        self.addresses = [own.address if rank == self._rank else next(others).address for rank in range(len(devices))]

    def close(self) -> None:
        for found in self._ranges:
            found.close()


class Collectives:
    """Sums and gathers between the ranks, over their memory."""

    def __init__(self, addresses: Sequence[int], rank: int, launch: Launch, patience: int = 0) -> None:
        """`patience`: how often a call looks for the other ranks before it gives up; 0: until they come."""
        self._addresses = tuple(addresses)
        self._rank = rank
        self._launch = launch
        self._patience = patience

    def sum(self, source: int, target: int, size: int, kind: str) -> bool:
        """Of all ranks' bytes at `source`, to `target`. False: not of such bytes; nothing was begun, on any rank."""
        return self._do(source, target, sums(size, kind, len(self._addresses)))

    def gather(self, source: int, target: int, size: int) -> bool:
        """All ranks' bytes at `source`, one behind the other, to `target`. False: not of such bytes."""
        return self._do(source, target, gathers(size))

    def _do(self, source: int, target: int, calls: Iterable[Call]) -> bool:
        done = False
        for call in calls:
            self._launch(call, Arguments(self._addresses, self._rank, source, target, HALF, call, self._patience))
            done = True
        return done


def _name(rank: int) -> str:
    return f"collectives of rank {rank}"
