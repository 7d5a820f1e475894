"""Stand-ins for CUDA's driver and NVML on a machine without a GPU: processes' checkpoint states, and how GPUs are linked.

A call that is no transition of CUDA's state machine is refused as the driver refuses it, so that a suspend that is undone wrongly shows.
"""

from __future__ import annotations

import ctypes
import threading
import uuid
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

RUNNING, LOCKED, CHECKPOINTED = "RUNNING", "LOCKED", "CHECKPOINTED"
OK, NOT_READY, ILLEGAL_STATE, OUT_OF_MEMORY, OPERATING_SYSTEM = 0, 600, 401, 2, 304
_NAMES = {
    OK: "CUDA_SUCCESS",
    NOT_READY: "CUDA_ERROR_NOT_READY",
    ILLEGAL_STATE: "CUDA_ERROR_ILLEGAL_STATE",
    OUT_OF_MEMORY: "CUDA_ERROR_OUT_OF_MEMORY",
    OPERATING_SYSTEM: "CUDA_ERROR_OPERATING_SYSTEM",
}
_STEPS = {
    "lock": (RUNNING, LOCKED),
    "checkpoint": (LOCKED, CHECKPOINTED),
    "restore": (CHECKPOINTED, LOCKED),
    "unlock": (LOCKED, RUNNING),
}


class _Uuid:
    def __init__(self, content: bytes = bytes(16)) -> None:
        self._content = ctypes.create_string_buffer(content, 16)

    @property
    def bytes(self) -> bytes:
        return self._content.raw

    def getPtr(self) -> int:
        return ctypes.addressof(self._content)


class Driver:
    """CUDA's driver, with processes by pid. `before` is called at each step, with its name and the pid; what it returns is the answer."""

    def __init__(self, uuids: list[str], pids: list[int]) -> None:
        self.uuids = uuids
        self.states = dict.fromkeys(pids, RUNNING)
        self.said: list[tuple[str, int]] = []
        self.pairs: list[tuple[str, str]] = []  # of the last restore that had any
        self.before: Callable[[str, int], int] = lambda step, pid: OK
        self._lock = threading.Lock()
        self.CUcheckpointLockArgs = self.CUcheckpointRestoreArgs = self.CUcheckpointGpuPair = SimpleNamespace
        self.CUuuid = _Uuid

    def cuInit(self, flags: int) -> tuple[int]:
        return (OK,)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return OK, len(self.uuids)

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return OK, ordinal

    def cuDeviceGetUuid(self, device: int) -> tuple[int, _Uuid]:
        return OK, _Uuid(uuid.UUID(self.uuids[device].removeprefix("GPU-")).bytes)

    def cuGetErrorName(self, code: int) -> tuple[int, bytes]:
        return OK, _NAMES[code].encode()

    def cuCheckpointProcessLock(self, pid: int, arguments: Any) -> tuple[int]:
        assert arguments.timeoutMs > 0, "a lock without a deadline may wait for ever"
        return self._step("lock", pid)

    def cuCheckpointProcessCheckpoint(self, pid: int, arguments: Any) -> tuple[int]:
        return self._step("checkpoint", pid)

    def cuCheckpointProcessRestore(self, pid: int, arguments: Any) -> tuple[int]:
        if arguments is not None:
            self.pairs = [(name(each.oldUuid), name(each.newUuid)) for each in arguments.gpuPairs]
        return self._step("restore", pid)

    def cuCheckpointProcessUnlock(self, pid: int, arguments: Any) -> tuple[int]:
        return self._step("unlock", pid)

    def _step(self, step: str, pid: int) -> tuple[int]:
        code = self.before(step, pid)
        with self._lock:
            self.said.append((step, pid))
            before, after = _STEPS[step]
            if code == OK and self.states[pid] != before:
                code = ILLEGAL_STATE
            if code == OK:
                self.states[pid] = after
        return (code,)


class NvmlError(Exception):
    """NVML does not say."""


class Nvml:
    """NVML. `links`: by two ordinals, the number of NVLinks, or the level of what they have in common as a negative number."""

    NVMLError = NvmlError
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK, NVML_NVLINK_MAX_LINKS, NVML_FEATURE_ENABLED = 2, 0, 18, 1

    def __init__(self, uuids: list[str], links: Mapping[tuple[int, int], int]) -> None:
        self._uuids = uuids
        self._links = links

    def nvmlInit(self) -> None:
        """There is nothing to load."""

    def nvmlDeviceGetHandleByUUID(self, identity: str) -> int:
        return self._uuids.index(identity)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetMinorNumber(self, handle: int) -> int:
        return handle

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(free=80 << 30, used=0, total=80 << 30)

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, index: int) -> int:
        assert index == self.NVML_P2P_CAPS_INDEX_NVLINK
        return self.NVML_P2P_STATUS_OK if self._link(one, other) > 0 else 1

    def nvmlDeviceGetTopologyCommonAncestor(self, one: int, other: int) -> int:
        return -self._link(one, other)

    def nvmlDeviceGetNvLinkState(self, handle: int, number: int) -> int:
        count = max((count for pair, count in self._links.items() if handle in pair), default=0)
        if number >= count:
            raise NvmlError("Not Supported")
        return self.NVML_FEATURE_ENABLED

    def _link(self, one: int, other: int) -> int:
        found = self._links.get((min(one, other), max(one, other)))
        if found is None:
            raise NvmlError("Unknown Error")
        return found


def name(raw: _Uuid) -> str:
    return f"GPU-{uuid.UUID(bytes=raw.bytes)}"
