"""The agent as its command line starts it, with a GPU driver that stands in for CUDA's and NVML's: `python -m tests.worlds.stand_in_driver
GPUS WORDS…`, where GPUS is a JSON list of {"uuid", "name", "minor"}, in CUDA's order.

Such a GPU is a device file /dev/nvidiaN. A process that holds it open (stand_in_engine.py) has it; to suspend the process is to have it
close that file, and to resume it to have it open the file of the GPU that the driver was told: by signals, in the process's own mount
namespace, as CUDA does it. What CRIU carries of it is then as little of a GPU as with CUDA. So it is seen on which GPU a process wakes,
and whether that GPU is in its container, without one.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from restore_agent.drivers import cuda
from tests.worlds import cuda_driver
from tests.worlds.cuda_driver import ILLEGAL_STATE, OK, name

CLOSE, OPEN = signal.SIGRTMIN + 1, signal.SIGRTMIN + 8  # and more by the minor number of the GPU to open
HELD = "tmp/stand-in-gpu"  # of a process: the GPU that it has, or had, by its minor number
_SIZE, _TOTAL = 64 << 20, 1 << 30  # bytes: what a process takes of a GPU, and what one has
_SECONDS = 5.0


class Driver(cuda_driver.Driver):
    """In for `cuda.bindings.driver`."""

    def __init__(self, gpus: list[Any]) -> None:
        super().__init__([str(gpu["uuid"]) for gpu in gpus], [])
        self._gpus = gpus

    def cuCheckpointProcessGetState(self, pid: int) -> tuple[int, int]:
        return OK, 0

    def cuCheckpointProcessLock(self, pid: int, arguments: Any) -> tuple[int]:
        return (OK,)

    def cuCheckpointProcessUnlock(self, pid: int, arguments: Any) -> tuple[int]:
        return (OK,)

    def cuCheckpointProcessCheckpoint(self, pid: int, arguments: Any) -> tuple[int]:
        os.kill(pid, CLOSE)
        return _until(lambda: not list(_held_by(pid)), pid)

    def cuCheckpointProcessRestore(self, pid: int, arguments: Any) -> tuple[int]:
        minor = int(Path(f"/proc/{pid}/root", HELD).read_text())
        if arguments:
            moves = {name(pair.oldUuid): name(pair.newUuid) for pair in arguments.gpuPairs}
            held = next(str(gpu["uuid"]) for gpu in self._gpus if gpu["minor"] == minor)
            minor = next(gpu["minor"] for gpu in self._gpus if gpu["uuid"] == moves[held])
        os.kill(pid, OPEN + minor)
        return _until(lambda: minor in _held_by(pid), pid)


class Nvml(cuda_driver.Nvml):
    """In for `pynvml`."""

    def __init__(self, gpus: list[Any]) -> None:
        super().__init__([str(gpu["uuid"]) for gpu in gpus], {})
        self._gpus = gpus

    def nvmlDeviceGetName(self, handle: int) -> str:
        return str(self._gpus[handle]["name"])

    def nvmlDeviceGetMinorNumber(self, handle: int) -> int:
        return int(self._gpus[handle]["minor"])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=_SIZE) for pid in _holders(self._gpus[handle]["minor"])]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        used = _SIZE * len(list(_holders(self._gpus[handle]["minor"])))
        return SimpleNamespace(total=_TOTAL, used=used, free=_TOTAL - used)


def _holders(minor: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and minor in _held_by(int(entry.name)):
            yield int(entry.name)


def _held_by(pid: int) -> Iterator[int]:
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if (name := str(link.readlink()).removeprefix("/dev/nvidia")).isdecimal():
                yield int(name)
    except OSError:
        return  # it ended, or closed the file


def _until(holds: Any, pid: int) -> tuple[int]:
    deadline = time.monotonic() + _SECONDS
    while not holds():
        if time.monotonic() > deadline or not Path(f"/proc/{pid}").exists():
            return (ILLEGAL_STATE,)
        time.sleep(0.001)
    return (OK,)


def main() -> None:
    gpus = json.loads(sys.argv[1])
    driver, nvml, package, bindings = Driver(gpus), Nvml(gpus), ModuleType("cuda"), ModuleType("cuda.bindings")
    vars(bindings)["driver"] = driver
    modules: dict[str, Any] = {"pynvml": nvml, "cuda": package, "cuda.bindings": bindings, "cuda.bindings.driver": driver}
    sys.modules.update(modules)
    cuda._DRIVER = Path("/dev/null")  # there is one
    sys.argv = ["zerowake", *sys.argv[2:]]
    runpy.run_module("scaler.programs.cli", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
