"""CUDA's process checkpoint, for whole process trees: the only file that calls it.

    RUNNING → lock → LOCKED → checkpoint → CHECKPOINTED → restore → LOCKED → unlock → RUNNING

All processes are locked before the first is checkpointed, and all are restored before the first is unlocked, so that none works against a
sibling that stands still. A step that fails for one is undone for all: the tree goes on running, with its GPU memory. The driver takes the
pids of this process's own pid namespace. `cuInit` is called once, at the start, so that no restore pays for it; no context is made, so it
costs no GPU memory. Source: CUDA driver API, "Checkpointing" (driver 570 and later); needs no `cuda-checkpoint` binary.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restore_agent.phases import Phases

_LOCK_MILLISECONDS = 10_000
_DRIVER = Path("/dev/nvidiactl")
_HEADROOM = 64 << 20  # bytes beside what the checkpoint gave back: a restore that runs out strands its process
_LOG = logging.getLogger("thaw.agent")


class CudaError(Exception):
    """The driver refused; the message has its own name for why."""


class NoGpuMemory(CudaError):
    """A resume would run out of GPU memory, so it was not begun."""


@dataclass(frozen=True)
class Gpus:
    """What a snapshot must find again."""

    driver: str
    names: tuple[str, ...]


class Cuda:
    """Use `Cuda.find`."""

    def __init__(self, driver: Any, nvml: Any) -> None:
        self._driver = driver
        self._nvml = nvml
        self._check(driver.cuInit(0), "initialise CUDA")
        nvml.nvmlInit()

    @classmethod
    def find(cls) -> Cuda | None:
        """None where there is no NVIDIA GPU. Raises CudaError: there is one, and it cannot be used."""
        if not _DRIVER.exists():
            return None
        try:
            import pynvml  # noqa: PLC0415  (both are there with the extra `gpu` alone)
            from cuda.bindings import driver  # noqa: PLC0415
        except ImportError as error:
            raise CudaError(f"this node has a GPU but {error.name} is missing; install thaw[gpu]") from error
        return cls(driver, pynvml)

    def gpus(self) -> Gpus:
        names = [self._nvml.nvmlDeviceGetName(handle) for handle in self._handles()]
        return Gpus(self._nvml.nvmlSystemGetDriverVersion(), tuple(names))

    def holders(self, pids: Iterable[int]) -> list[int]:
        """Those of the processes that have CUDA state to suspend."""
        return [pid for pid in pids if _has_gpu_open(pid) and self._driver.cuCheckpointProcessGetState(pid)[0] == 0]

    def used(self) -> int:
        """Bytes in use on all GPUs together."""
        return sum(self._nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self._handles())

    def free(self) -> int:
        return sum(self._nvml.nvmlDeviceGetMemoryInfo(handle).free for handle in self._handles())

    async def suspend(self, pids: Sequence[int]) -> int:
        """RUNNING → CHECKPOINTED, all of them. Returns the bytes of GPU memory that came free.

        Raises:
            CudaError: one refused; all run again.
        """
        if not pids:
            return 0
        before = self.used()
        locked: list[int] = []
        try:
            for pid in pids:
                await asyncio.to_thread(self._lock, pid)
                locked.append(pid)
            await _all(self._checkpoint, pids)
        except BaseException:
            await asyncio.shield(self._undo(locked))
            raise
        return max(0, before - self.used())

    async def resume(self, pids: Sequence[int], phases: Phases, needed: int = 0) -> None:
        """CHECKPOINTED → RUNNING, all of them, where they were. `needed`: bytes of GPU memory they will take.

        Raises:
            NoGpuMemory: less is free; nothing was begun.
            CudaError: the driver refused; the processes are of no more use.
        """
        if not pids:
            return
        if needed and (free := self.free()) < needed + _HEADROOM:
            raise NoGpuMemory(
                f"resuming needs {needed >> 20} MiB of GPU memory and {free >> 20} MiB are free; end a replica, or give the pool less"
            )
        with phases.phase("cuda.restore"):
            await _all(self._restore, pids)
        with phases.phase("cuda.unlock"):
            await _all(self._unlock, pids)

    async def _undo(self, pids: Sequence[int]) -> None:
        for pid in pids:
            for step in (self._restore, self._unlock):
                try:
                    await asyncio.to_thread(step, pid)
                except CudaError as error:
                    _LOG.debug("undoing a suspend: %s", error)  # it was not that far

    def _lock(self, pid: int) -> None:
        arguments = self._driver.CUcheckpointLockArgs()
        arguments.timeoutMs = _LOCK_MILLISECONDS
        self._check(self._driver.cuCheckpointProcessLock(pid, arguments), f"lock pid {pid} within {_LOCK_MILLISECONDS} ms")

    def _checkpoint(self, pid: int) -> None:
        self._check(self._driver.cuCheckpointProcessCheckpoint(pid, None), f"checkpoint pid {pid}")

    def _restore(self, pid: int) -> None:
        self._check(self._driver.cuCheckpointProcessRestore(pid, None), f"restore pid {pid}")

    def _unlock(self, pid: int) -> None:
        self._check(self._driver.cuCheckpointProcessUnlock(pid, None), f"unlock pid {pid}")

    def _check(self, answer: tuple[Any, ...], what: str) -> None:
        if answer[0] != 0:
            _, name = self._driver.cuGetErrorName(answer[0])
            raise CudaError(f"CUDA cannot {what}: {name.decode() if isinstance(name, bytes) else name}")

    def _handles(self) -> list[Any]:
        return [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]


async def _all(step: Callable[[int], None], pids: Sequence[int]) -> None:
    """In parallel; waits for all of them, whatever one of them raises."""
    done = await asyncio.shield(asyncio.gather(*(asyncio.to_thread(step, pid) for pid in pids), return_exceptions=True))
    for result in done:
        if isinstance(result, BaseException):
            raise result


def _has_gpu_open(pid: int) -> bool:
    try:
        return any(str(link.readlink()).startswith("/dev/nvidia") for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False  # it ended meanwhile
