"""What CUDA and cuBLAS hold of a GPU for a process beside its tensors, and an engine that sleeps does without.

Stacks       CUDA keeps one for each thread that the GPU can run at once: 264 MiB on an H200, at the 1,024 bytes that a thread has at first,
             and 2.1 GiB once a kernel has wanted 8 KiB. A suspend copies them to the host, and a resume back. Asleep they are let go of.
             The limit that was there, which CUDA raises as kernels want it, is set again before anything is computed: a graph is launched
             with the stacks that it was captured with, and crashes on smaller ones (driver 580; tests/gpu/test_context_memory.py).
Workspaces   Torch has one for each stream that cuBLAS was used on, of 32 MiB on Hopper. They are let go of, too, and made again by the
             first product of matrices. A graph goes on using the one that it was captured with. So each capture begins without any, and has
             its own, of the memory that graphs compute in.
"""

from __future__ import annotations

from typing import Any

import torch

_SMALLEST = 16  # bytes of a thread's stack, below which CUDA sets nothing


class Stacks:
    """Those of this process's context on the GPU that torch uses."""

    def __init__(self) -> None:
        self._limit = 0  # bytes of each, while they are let go of

    def let_go(self) -> int:
        """Returns the bytes that `take_back` will need. Nothing may compute until then. Raises RuntimeError."""
        if not self._limit:
            self._limit = _stack()
            _set_stack(_SMALLEST)
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return (self._limit - _SMALLEST) * int(gpu.multi_processor_count * gpu.max_threads_per_multi_processor)

    def take_back(self) -> None:
        """Without `let_go` before it, nothing. Raises RuntimeError: the GPU has not so much memory, or the driver refuses."""
        if self._limit:
            _set_stack(self._limit)
            self._limit = 0


class Workspaces:
    """Those that torch has for cuBLAS in this process."""

    def __init__(self) -> None:
        self._apart = False

    def keep_apart(self) -> None:
        """From now on each CUDA graph is captured with workspaces of its own. To be called before the first one is."""
        if self._apart or not torch.cuda.is_available():
            return
        self._apart = True
        begin = torch.cuda.CUDAGraph.capture_begin

        def capture_begin(graph: Any, *arguments: Any, **named: Any) -> None:
            torch._C._cuda_clearCublasWorkspaces()
            begin(graph, *arguments, **named)

        torch.cuda.CUDAGraph.capture_begin = capture_begin

    def let_go(self) -> None:
        """Unless there may be graphs that use them."""
        if self._apart:
            torch._C._cuda_clearCublasWorkspaces()


def _stack() -> int:
    driver = _driver()
    code, limit = driver.cuCtxGetLimit(driver.CUlimit.CU_LIMIT_STACK_SIZE)
    _check(code, "say how large the stacks of a GPU's threads are")
    return int(limit)


def _set_stack(size: int) -> None:
    driver = _driver()
    (code,) = driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_STACK_SIZE, size)
    _check(code, f"give each thread of the GPU a stack of {size} bytes; does something else take its memory?")


def _driver() -> Any:
    from cuda.bindings import driver  # noqa: PLC0415  (where there is a GPU)

    torch.cuda.synchronize()  # makes torch's context this thread's
    return driver


def _check(code: Any, what: str) -> None:
    if code.name != "CUDA_SUCCESS":
        raise RuntimeError(f"CUDA cannot {what} ({code.name})")
