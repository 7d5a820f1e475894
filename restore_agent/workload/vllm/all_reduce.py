"""vLLM's sums and gathers between tensor-parallel ranks, over memory that comes through a dump (peer_memory.py, all_reduce.cu).

vLLM asks its device communicator for them; `AllReduce.install` puts ours before what it would take itself, which is NCCL over the host's
shared memory (collectives.py) and stays for whatever ours does not take. It is installed where every rank reaches every other's memory and
a first sum and gather are right; else the engine runs by NCCL alone, and its log says why. vLLM's own `--disable-custom-all-reduce` keeps
it out.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from gpumem.client import Client, GpumemError, MemoryFailed
from restore_agent.workload.vllm.collective_call import HALF, MOST_RANKS, VECTOR, Call
from restore_agent.workload.vllm.collective_kernel import Arguments, Kernel, KernelFailed
from restore_agent.workload.vllm.peer_memory import Collectives, PeerMemory

_PATIENCE = 1 << 22  # looks for the others in the first try: seconds
_TRIED = (1 << 13, 1 << 20, HALF + (1 << 20))  # bytes: one block, many, more than one call
FAILURES = (GpumemError, KernelFailed, MemoryFailed)
_log = init_logger("vllm.zerowake.all_reduce")  # below vLLM's own, so that it is shown


class AllReduce:
    """In the place of a device communicator's `all_reduce` and `all_gather`."""

    def __init__(self, communicator: Any, collectives: Collectives, ranks: int) -> None:
        self._collectives = collectives
        self._ranks = ranks
        self._all_reduce: Callable[[Any], Any] = communicator.all_reduce
        self._all_gather: Callable[[Any, int], Any] = communicator.all_gather

    @classmethod
    def install(cls, client: Client) -> None:
        """On every rank at the same time, before anything is captured."""
        communicator: Any = get_tp_group().device_communicator
        cpu: Any = get_tp_group().cpu_group
        rank, ranks = get_tp_group().rank_in_group, get_tp_group().world_size
        said: list[Any] = [secrets.token_hex(32)]
        dist.broadcast_object_list(said, src=get_tp_group().ranks[0], group=cpu)
        client.meet(said[0].encode())
        memory: PeerMemory | None = None
        why = "" if ranks <= MOST_RANKS else f"there are {ranks} of them, and {MOST_RANKS} are the most"
        try:
            kernel = Kernel(torch.cuda.get_device_capability())
            memory = PeerMemory(client, rank)
        except FAILURES as error:
            why = str(error)
        devices = _exchanged(client.device, cpu, ranks)
        if not (why := _first(why, cpu, ranks)) and memory:
            try:
                memory.join(devices)
            except FAILURES as error:
                why = str(error)
            why = _first(why, cpu, ranks)

        def launch(call: Call, arguments: Arguments) -> None:
            kernel.launch(call, arguments, torch.cuda.current_stream().cuda_stream)

        if not why and memory:
            try:
                why = _tried(Collectives(memory.addresses, rank, launch, _PATIENCE), rank, ranks)
            except FAILURES as error:
                why = str(error)
            why = _first(why, cpu, ranks)
        if why or memory is None:
            if memory:
                memory.close()
            _log.warning("ranks talk by NCCL over the host's memory, which is slower, since they do not over each other's: %s", why)
            return
        ours = cls(communicator, Collectives(memory.addresses, rank, launch), ranks)
        communicator.all_reduce, communicator.all_gather = ours.all_reduce, ours.all_gather
        _log.info("%d ranks talk over each other's memory, lent by gpumem", ranks)

    def all_reduce(self, input_: Any) -> Any:
        if _is_plain(input_):
            out = torch.empty_like(input_)
            if self._collectives.sum(input_.data_ptr(), out.data_ptr(), input_.nbytes, _kind(input_)):
                return out
        return self._all_reduce(input_)

    def all_gather(self, input_: Any, dim: int = -1) -> Any:
        if _is_plain(input_) and input_.nbytes:
            shape, dim = input_.size(), dim % input_.dim()
            out = torch.empty((self._ranks, *shape), dtype=input_.dtype, device=input_.device)
            if self._collectives.gather(input_.data_ptr(), out.data_ptr(), input_.nbytes):
                return out.movedim(0, dim).reshape(*shape[:dim], self._ranks * shape[dim], *shape[dim + 1 :])
        return self._all_gather(input_, dim)


def _tried(collectives: Collectives, rank: int, ranks: int) -> str:
    """What is wrong with sums and gathers of numbers that any order of adding gives exactly; empty: nothing."""
    for size in _TRIED:
        of_each = [torch.arange(size // 2, device="cuda").add(each).remainder(13).sub(6).to(torch.bfloat16) for each in range(ranks)]
        added, gathered = torch.empty_like(of_each[0]), torch.empty((ranks, size // 2), dtype=torch.bfloat16, device="cuda")
        collectives.sum(of_each[rank].data_ptr(), added.data_ptr(), size, "bfloat16")
        collectives.gather(of_each[rank].data_ptr(), gathered.data_ptr(), size)
        torch.cuda.synchronize()
        if not torch.equal(added, torch.stack(of_each).float().sum(0).to(torch.bfloat16)):
            return f"a first sum of {size} bytes over them is wrong"
        if not torch.equal(gathered, torch.stack(of_each)):
            return f"a first gather of {size} bytes over them is wrong"
    return ""


def _exchanged(mine: Any, cpu: Any, ranks: int) -> list[Any]:
    said: list[Any] = [None] * ranks
    dist.all_gather_object(said, mine, group=cpu)
    return said


def _first(why: str, cpu: Any, ranks: int) -> str:
    """What any rank says, the same on all of them: they do it together or not at all."""
    return next((each for each in _exchanged(why, cpu, ranks) if each), "")


def _is_plain(tensor: Any) -> bool:
    """Whether its bytes lie one behind the other, as the kernel takes them."""
    return bool(tensor.is_contiguous()) and tensor.data_ptr() % VECTOR == 0


def _kind(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
