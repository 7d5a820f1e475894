"""The memory that gpumem lends to an engine's process on a GPU: one client, the scratch that its CUDA graphs compute in, and the way to
sleep and back. All of it is torch's and gpumem's; what an engine calls it for is in its adapter."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from gpumem.client import Client
from gpumem.client.torch import ScratchPool
from restore_agent.workload.context_memory import Stacks, Workspaces
from restore_agent.workload.control_directory import ControlDirectory

_stacks, _workspaces = Stacks(), Workspaces()


@dataclass(frozen=True)
class Reserved:
    """What torch has taken of the GPU for itself, in bytes. `used`: that tensors lie in."""

    size: int
    used: int

    def __str__(self) -> str:
        return f"{self.size >> 20} MiB, {self.used >> 20} of them in use"


@cache
def client(label: str) -> Client:
    """This process's, for the GPU that torch uses; without one, for the host's memory. Raises PeerGone, WrongDevice."""
    if not torch.cuda.is_available():
        return Client(label=label)
    return Client(device=f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}", label=label)


@cache
def graph_pool(client: Client) -> ScratchPool:
    """Where CUDA graphs keep what they compute. Its memory has no content that would have to outlive a replay."""
    _workspaces.keep_apart()
    return ScratchPool(client)


def let_go(client: Client, forget: Callable[[], object] = lambda: None) -> tuple[Reserved, Reserved]:
    """Of all that is lent, of what torch keeps in reserve, and of what the context holds (context_memory.py). The agent is told how much of
    it the wake takes again. Returns what torch has taken before and after.

    Args:
        forget: drops tensors of the engine's that it makes again when it needs them.

    Raises what `quiesce` and `Stacks.let_go` do.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    before = _reserved()
    forget()
    _workspaces.let_go()
    gc.collect()
    torch.cuda.empty_cache()
    if hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
    client.quiesce()
    ctypes.CDLL(None).malloc_trim(0)
    after = _reserved()
    if torch.cuda.is_available():
        again = _stacks.let_go() + max(0, before.used - after.used)
        if control := ControlDirectory.from_environment():
            control.name_wake_bytes(client.device, again)
    return before, after


def take_back(client: Client, moved: Mapping[str, str], meeting: bytes = b"") -> None:
    """The same memory at the same addresses; scratch is zeros. `moved`, `meeting`: as `Client.resume` takes them.

    Raises what that and `Stacks.take_back` do.
    """
    _stacks.take_back()
    client.resume(moved=moved, meeting=meeting)


def _reserved() -> Reserved:
    return Reserved(torch.cuda.memory_reserved(), torch.cuda.memory_allocated())
