"""CUDA's process checkpoint, for whole process trees: the only file that calls it.

    RUNNING → lock → LOCKED → checkpoint → CHECKPOINTED → restore → LOCKED → unlock → RUNNING

All processes are locked before the first is checkpointed, and all are restored before the first is unlocked, so that none works against a
sibling that stands still. Each step is done to all of them at once, with one deadline. A suspend that fails for one is undone for all: the
tree goes on running, with its GPU memory. A resume that fails for one is the end of all: ranks that compute together are of no use alone.
The driver takes the pids of this process's own pid namespace. `cuInit` is called once, at the start, so that no restore pays for it; no
context is made, so it costs no GPU memory. A process wakes on other GPUs by a list of pairs, which must name every GPU that the driver
shows it, used or not: on one machine all, in a container those whose device files it has.
Source: CUDA driver API, "Checkpointing" (driver 570 and later); needs no `cuda-checkpoint` binary.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from restore_agent.errors import AgentError
from restore_agent.snapshots.manifest import GpuRecord

_LOCK_MILLISECONDS = 10_000
_STEP_SECONDS = 60.0  # a driver that has not done one step to all processes by then hangs
_DRIVER = Path("/dev/nvidiactl")
_ENDED = "as of a process that ended meanwhile: look for what killed it, such as the kernel for lack of memory"
_REMEDIES = {
    ("lock", "CUDA_ERROR_NOT_READY"): "its GPU was still at work: have the engine quiesce before (the control directory), or end its work",
    ("restore", "CUDA_ERROR_NOT_SUPPORTED"): "it was suspended with memory that another process lends still mapped, and is lost: "
    "the engine must unmap all of it as it quiesces (gpumem's client does)",
    ("restore", "CUDA_ERROR_OUT_OF_MEMORY"): "the GPU's memory was taken meanwhile, and the process is lost: end what took it",
    **{(step, "CUDA_ERROR_OPERATING_SYSTEM"): _ENDED for step in ("lock", "checkpoint", "restore", "unlock")},
}
# NVML's levels of what two GPUs have in common, as `nvidia-smi topo -m` calls them.
_PCIE = {0: "PSB", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
_LOG = logging.getLogger("zerowake.agent")


class CudaError(AgentError):
    """The driver refused; the message has its own name for why."""

    reason = "cuda-failed"


class ResumeSeconds(NamedTuple):
    """Where the time of a resume went."""

    restore: float  # state and memory back to the GPU
    unlock: float


@dataclass(frozen=True)
class NodeGpu:
    """A GPU, by what it is called."""

    uuid: str  # "GPU-…"
    index: int  # in the order of the PCI bus
    minor: int  # of its device file, /dev/nvidiaMINOR


class Cuda:
    """Use `Cuda.find`."""

    def __init__(self, driver: Any, nvml: Any) -> None:
        self._driver = driver
        self._nvml = nvml
        self._check(driver.cuInit(0), "initialise CUDA")
        nvml.nvmlInit()
        self._promised: dict[str, int] = {}  # UUID → bytes that resumes under way will take
        self._uuids = {f"GPU-{uuid.UUID(bytes=bytes(raw.bytes)[:16])}": raw for raw in self._driver_uuids()}
        try:
            names = [nvml.nvmlDeviceGetName(self._handle(identity)) for identity in self._uuids]
        except nvml.NVMLError as error:
            raise CudaError(f"a GPU of this node is not known by its UUID ({error}); is it partitioned (MIG)? Use whole GPUs") from None
        driver_version = nvml.nvmlSystemGetDriverVersion()
        links = tuple(tuple(self._link(one, other) for other in self._uuids) for one in self._uuids)
        # Asked once: every restore wants it.
        self.known = tuple(self._known(identity) for identity in self._uuids)  # in CUDA's order
        self._gpus = GpuRecord(driver=driver_version, names=tuple(names), uuids=tuple(self._uuids), links=links)

    @classmethod
    def find(cls) -> Cuda | None:
        """None where there is no NVIDIA GPU. Raises CudaError: there is one, and it cannot be used."""
        if not _DRIVER.exists():
            return None
        try:
            import pynvml  # noqa: PLC0415  (both are there with the extra `gpu` alone)
            from cuda.bindings import driver  # noqa: PLC0415
        except ImportError as error:
            extra = "install zerowake with its extra `gpu`: pip install '.[gpu]' in a checkout of it"
            raise CudaError(f"this node has a GPU but {error.name} is missing; {extra}") from error
        try:
            return cls(driver, pynvml)
        except (RuntimeError, pynvml.NVMLError) as error:  # how the two say that there is no library of the driver's
            remedy = "a container has it by NVIDIA's container runtime (on Kubernetes: the chart's gpumem.runtimeClassName)"
            raise CudaError(f"this node has a GPU, and its driver cannot be used from here: {error}; {remedy}") from error

    def gpus(self, of: Collection[str] | None = None) -> GpuRecord:
        """All of the node, or those of these UUIDs that are here; in CUDA's order."""
        return self._gpus if of is None else self._gpus.only(of)

    def chosen(self, env: Mapping[str, str]) -> str:
        """UUID of the GPU that a process with this environment uses first; empty: it sees none."""
        visible = env.get("CUDA_VISIBLE_DEVICES")
        first = "0" if visible is None else visible.partition(",")[0].strip()
        if first.isdigit():
            return list(self._uuids)[int(first)] if int(first) < len(self._uuids) else ""
        return next((identity for identity in self._uuids if first and identity.startswith(first)), "")

    def holders(self, pids: Iterable[int]) -> list[int]:
        """Those of the processes that have CUDA state to suspend."""
        return [pid for pid in pids if _has_gpu_open(pid) and self._driver.cuCheckpointProcessGetState(pid)[0] == 0]

    def held(self, pids: Collection[int]) -> dict[str, int]:
        """UUID → bytes that these processes hold there. Empty: the driver does not say, as where it sees other pids than ours."""
        found: dict[str, int] = {}
        for identity in self._uuids:
            try:
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle(identity))
            except self._nvml.NVMLError as error:
                _LOG.debug("what processes hold of %s is not known: %s", identity, error)
                continue
            for process in processes:
                if process.pid in pids and process.usedGpuMemory:
                    found[identity] = found.get(identity, 0) + int(process.usedGpuMemory)
        return found

    def used(self) -> int:
        """Bytes in use on all GPUs together."""
        return sum(self._used().values())

    def free(self) -> dict[str, int]:
        """UUID → bytes that are free and not promised to a resume under way."""
        found = {identity: int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle(identity)).free) for identity in self._uuids}
        return {identity: size - self._promised.get(identity, 0) for identity, size in found.items()}

    def total(self) -> dict[str, int]:
        """UUID → all of its bytes."""
        return {identity: int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle(identity)).total) for identity in self._uuids}

    @contextlib.contextmanager
    def promised(self, needed: Mapping[str, int]) -> Iterator[None]:
        """Counts these bytes of each GPU as taken until the block ends: several resumes begin at once, and each must find its memory."""
        for identity, size in needed.items():
            self._promised[identity] = self._promised.get(identity, 0) + size
        try:
            yield
        finally:
            for identity, size in needed.items():
                self._promised[identity] -= size

    async def suspend(self, pids: Sequence[int], among: Collection[str] | None = None) -> dict[str, int]:
        """RUNNING → CHECKPOINTED, all of them. Returns the bytes that came free, of each GPU that they used.

        Args:
            among: UUIDs of the GPUs that they may have used; None: any. What others give back on the rest meanwhile does not count.

        Raises:
            CudaError: one refused; all run again.
        """
        if not pids:
            return {}
        before = self._used()
        try:
            await _all("lock", self._lock, pids)
            await _all("checkpoint", self._checkpoint, pids)
        except BaseException:
            await asyncio.shield(self._undo(pids))
            raise
        after = self._used()
        freed = {identity: size - after[identity] for identity, size in before.items() if size > after[identity]}
        return {identity: size for identity, size in freed.items() if among is None or identity in among}

    async def resume(self, pids: Sequence[int], moves: Mapping[str, str] | None = None) -> ResumeSeconds:
        """CHECKPOINTED → RUNNING, all of them. Their memory must be free: a process that runs out of it here is stranded.

        Args:
            moves: UUID of each GPU at the suspend → UUID of one here; none: each where it was.

        Raises:
            CudaError: the driver refused; the processes are of no more use.
        """
        if not pids:
            return ResumeSeconds(0.0, 0.0)
        arguments = self._pairs(moves) if moves and any(old != new for old, new in moves.items()) else None
        begin = time.monotonic()
        try:
            await _all("restore", lambda pid: self._restore(pid, arguments), pids)
            restored = time.monotonic()
            await _all("unlock", self._unlock, pids)
        except CudaError as error:
            if len(pids) == 1:
                raise
            raise CudaError(f"{error}; all {len(pids)} processes of the engine that hold GPU state are lost with it") from error
        return ResumeSeconds(restored - begin, time.monotonic() - restored)

    async def _undo(self, pids: Sequence[int]) -> None:
        """Brings each back from wherever it has got to. None is unlocked while another has no GPU state yet."""
        steps: dict[str, Callable[[int], None]] = {"restore": lambda pid: self._restore(pid, None), "unlock": self._unlock}
        for name, step in steps.items():
            try:
                await _all(name, step, pids)
            except CudaError as error:
                _LOG.debug("undoing a suspend: %s", error)  # it was not that far

    def _lock(self, pid: int) -> None:
        arguments = self._driver.CUcheckpointLockArgs()
        arguments.timeoutMs = _LOCK_MILLISECONDS
        self._check(self._driver.cuCheckpointProcessLock(pid, arguments), f"lock pid {pid} within {_LOCK_MILLISECONDS} ms")

    def _checkpoint(self, pid: int) -> None:
        self._check(self._driver.cuCheckpointProcessCheckpoint(pid, None), f"checkpoint pid {pid}")

    def _restore(self, pid: int, arguments: Any) -> None:
        self._check(self._driver.cuCheckpointProcessRestore(pid, arguments), f"restore pid {pid}")

    def _unlock(self, pid: int) -> None:
        self._check(self._driver.cuCheckpointProcessUnlock(pid, None), f"unlock pid {pid}")

    def _check(self, answer: tuple[Any, ...], what: str) -> None:
        if answer[0] != 0:
            _, name = self._driver.cuGetErrorName(answer[0])
            name = name.decode() if isinstance(name, bytes) else name
            remedy = _REMEDIES.get((what.partition(" ")[0], name), "")
            raise CudaError(f"CUDA cannot {what}: {name}{f'; {remedy}' if remedy else ''}")

    def _pairs(self, moves: Mapping[str, str]) -> Any:
        if len(set(moves.values())) != len(moves) or not set(moves.values()) <= self._uuids.keys():
            raise CudaError(
                f"the processes' {len(moves)} GPUs cannot be these: {', '.join(moves.values())}; each needs one of this node's own"
            )
        pairs = []
        for old, new in moves.items():
            pair = self._driver.CUcheckpointGpuPair()
            pair.oldUuid, pair.newUuid = self._raw(old), self._uuids[new]
            pairs.append(pair)
        arguments = self._driver.CUcheckpointRestoreArgs()
        arguments.gpuPairs, arguments.gpuPairsCount = pairs, len(pairs)
        return arguments

    def _raw(self, identity: str) -> Any:
        raw = self._driver.CUuuid()
        ctypes.memmove(raw.getPtr(), uuid.UUID(identity.removeprefix("GPU-")).bytes, 16)  # its `bytes` can only be read
        return raw

    def _driver_uuids(self) -> Iterator[Any]:
        count = self._driver.cuDeviceGetCount()
        self._check(count, "count the GPUs")
        for ordinal in range(count[1]):
            device = self._driver.cuDeviceGet(ordinal)
            self._check(device, f"open GPU {ordinal}")
            found = self._driver.cuDeviceGetUuid(device[1])
            self._check(found, f"name GPU {ordinal}")
            yield found[1]

    def _link(self, one: str, other: str) -> str:
        """As `nvidia-smi topo -m` calls it. Empty: NVML does not say, as on some virtual machines."""
        if one == other:
            return "X"
        nvml, handles = self._nvml, [self._handle(one), self._handle(other)]
        try:
            if nvml.nvmlDeviceGetP2PStatus(*handles, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
                return f"NV{min(map(self._nvlinks, handles))}"
            return _PCIE.get(nvml.nvmlDeviceGetTopologyCommonAncestor(*handles), "")
        except nvml.NVMLError as error:
            _LOG.debug("how %s reaches %s is not known: %s", one, other, error)
            return ""

    def _nvlinks(self, handle: Any) -> int:
        """Of a GPU, those that are up."""
        count = 0
        for number in range(self._nvml.NVML_NVLINK_MAX_LINKS):
            with contextlib.suppress(self._nvml.NVMLError):  # it has fewer
                count += self._nvml.nvmlDeviceGetNvLinkState(handle, number) == self._nvml.NVML_FEATURE_ENABLED
        return count

    def _used(self) -> dict[str, int]:
        return {identity: int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle(identity)).used) for identity in self._uuids}

    def _known(self, identity: str) -> NodeGpu:
        handle = self._handle(identity)
        return NodeGpu(identity, int(self._nvml.nvmlDeviceGetIndex(handle)), int(self._nvml.nvmlDeviceGetMinorNumber(handle)))

    def _handle(self, identity: str) -> Any:
        return self._nvml.nvmlDeviceGetHandleByUUID(identity)


async def _all(name: str, step: Callable[[int], None], pids: Sequence[int]) -> None:
    """In parallel; waits for all of them, whatever one of them raises, but not for ever. Raises what the first of them raised."""
    work = {pid: asyncio.create_task(asyncio.to_thread(step, pid), name=f"CUDA: {name} pid {pid}") for pid in pids}
    for each in work.values():
        each.add_done_callback(_looked_at)
    waiting = asyncio.ensure_future(asyncio.wait(work.values(), timeout=_STEP_SECONDS))
    try:
        _, late = await asyncio.shield(waiting)
    except asyncio.CancelledError:
        await asyncio.wait([waiting])  # whoever undoes it finds all of them at rest
        raise
    failed = [error for each in work.values() if each.done() and (error := each.exception())]
    if late:
        hung = ", ".join(str(pid) for pid, each in work.items() if each in late)
        failed.append(CudaError(f"CUDA does not {name} pid {hung} within {_STEP_SECONDS:.0f} s: look for Xid errors in the kernel's log"))
    if failed:
        raise failed[0]


def _looked_at(task: asyncio.Task[None]) -> None:
    """It may end when nobody waits for it any more."""
    if not task.cancelled() and (error := task.exception()):
        _LOG.debug("%s: %s", task.get_name(), error)


def _has_gpu_open(pid: int) -> bool:
    try:
        return any(str(link.readlink()).startswith("/dev/nvidia") for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False  # it ended meanwhile
