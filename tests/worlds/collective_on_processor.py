"""all_reduce.cu's kernel on the processor: compiled by gcc, a POSIX thread for each of a GPU's, and its launches, which block."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import restore_agent.workload.vllm as adapter
from restore_agent.workload.vllm.collective_call import Call
from restore_agent.workload.vllm.collective_kernel import Arguments

SOURCE = Path(__file__).with_suffix(".c")
KERNEL = Path(adapter.__file__).with_name("all_reduce.cu")
BLOCKS, THREADS = 3, 8  # of a launch at most, and of each block: a processor has fewer


def build(folder: Path) -> Path:
    """The library, put there."""
    library = folder / "collective.so"
    words = ["gcc", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", f'-DALL_REDUCE="{KERNEL}"']
    subprocess.run([*words, str(SOURCE), "-o", str(library)], check=True, timeout=60)
    return library


class Processor:
    """In the place of a GPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.header_size.restype = ctypes.c_uint64

    @property
    def header_size(self) -> int:
        return int(self._library.header_size())

    def launch(self, call: Call, arguments: Arguments) -> None:
        failed = self._library.launch(min(call.blocks, BLOCKS), THREADS, arguments.pointers)
        assert not failed, "no more threads"


class Graph:
    """Launches that are noted and done later, again and again, with the addresses that they had, as a CUDA graph's."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._launches: list[tuple[Call, Arguments]] = []

    def capture(self, call: Call, arguments: Arguments) -> None:
        self._launches.append((call, arguments))

    def replay(self) -> None:
        for call, arguments in self._launches:
            self._processor.launch(call, arguments)
