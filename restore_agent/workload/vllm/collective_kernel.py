"""The kernel of all_reduce.cu, compiled by NVRTC for the GPU that is there and launched on a stream: the only file here that calls CUDA.

NVRTC comes with torch, and takes a second. What it makes is a module of this process's, which CUDA's checkpoint carries as any other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from restore_agent.workload.vllm.collective_call import MOST_RANKS, THREADS, Call


class KernelFailed(Exception):
    """CUDA does not compile, load or launch it; says what it said."""


class Peers(ctypes.Structure):
    """The `peers` of all_reduce.cu."""

    _fields_ = (("at", ctypes.c_void_p * MOST_RANKS),)


class Arguments:
    """What `collective` is called with, as a C compiler's ABI and CUDA's both want it: an address for each argument."""

    def __init__(self, addresses: Sequence[int], rank: int, source: int, target: int, half: int, call: Call, patience: int) -> None:
        """`addresses`: of each rank's memory, as it is mapped here."""
        self.values: tuple[Any, ...] = (
            Peers((ctypes.c_void_p * MOST_RANKS)(*addresses)),
            ctypes.c_uint32(rank),
            ctypes.c_uint32(len(addresses)),
            ctypes.c_void_p(source + call.offset),
            ctypes.c_void_p(target + call.offset),
            ctypes.c_uint64(call.vectors),
            ctypes.c_uint64(call.pitch),
            ctypes.c_uint64(half),
            ctypes.c_uint32(call.mode),
            ctypes.c_uint32(call.kind),
            ctypes.c_uint64(patience),
        )
        self.pointers = (ctypes.c_void_p * len(self.values))(*(ctypes.addressof(value) for value in self.values))


class Kernel:
    """Compiled for one GPU. A context of this process's must be current."""

    def __init__(self, capability: tuple[int, int]) -> None:
        """`capability`: of the GPU, major and minor. Raises KernelFailed."""
        try:
            from cuda.bindings import driver, nvrtc  # noqa: PLC0415  (an engine on a GPU has them)
        except ImportError as error:
            raise KernelFailed(f"{error.name} is not installed: pip install cuda-python") from None
        self._driver = driver
        code = compiled(nvrtc, f"sm_{capability[0]}{capability[1]}")
        self._module = self._done(driver.cuModuleLoadData(code), "load it")
        self._function = self._done(driver.cuModuleGetFunction(self._module, b"collective"), "find it")

    def launch(self, call: Call, arguments: Arguments, stream: int) -> None:
        """Returns at once; while the stream is captured it becomes a part of its graph. Raises KernelFailed."""
        grid, block = (call.blocks, 1, 1), (THREADS, 1, 1)
        self._done(
            self._driver.cuLaunchKernel(self._function, *grid, *block, 0, stream, ctypes.addressof(arguments.pointers), 0), "launch it"
        )

    def _done(self, answer: tuple[Any, ...], what: str) -> Any:
        if answer[0] != 0:
            raise KernelFailed(f"CUDA does not {what}: {answer[0].name}")
        return answer[1] if len(answer) > 1 else None


def compiled(nvrtc: Any, architecture: str) -> bytes:
    """As the driver loads it. Raises KernelFailed, with what the compiler says."""

    def done(answer: tuple[Any, ...]) -> Any:
        if answer[0] != 0:
            raise KernelFailed(f"NVRTC does not compile it for {architecture}: {answer[0].name}{log() if program else ''}")
        return answer[1] if len(answer) > 1 else None

    def log() -> str:
        size = nvrtc.nvrtcGetProgramLogSize(program)[1]
        said = b" " * size
        nvrtc.nvrtcGetProgramLog(program, said)
        return f"\n{said.decode(errors='replace')}"

    program: Any = None
    source = (files(__package__) / "all_reduce.cu").read_bytes()
    try:
        program = done(nvrtc.nvrtcCreateProgram(source, b"all_reduce.cu", 0, [], []))
    except RuntimeError as error:  # there is no library of it to load
        raise KernelFailed(f"NVRTC cannot be loaded: {error}") from None
    options = [f"--gpu-architecture={architecture}".encode()]
    done(nvrtc.nvrtcCompileProgram(program, len(options), options))
    code = b" " * int(done(nvrtc.nvrtcGetCUBINSize(program)))
    done(nvrtc.nvrtcGetCUBIN(program, code))
    return code
