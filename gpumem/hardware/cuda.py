"""A GPU's memory by CUDA's virtual memory functions; the only file that calls them, or CUDA's copies.

Making memory, exporting, importing and mapping it need the driver but no context (seen with driver 580): so whoever only lends or maps
holds none, and a fault elsewhere cannot reach it. The device's primary context, the one that torch uses too, is made when the first copy
asks for it, and is current only during a call.

What the driver does, as measured on an H200; gpumem's design rests on it:
- Exported memory lives on through its descriptor when its creator is killed. New memory reads as zeros.
- An allocation is mapped whole or not at all: no offset, no smaller size (NOT_SUPPORTED).
- Creating costs about 0.2 ms a piece whatever its size; mapping 16 GiB takes 1.5 ms in pieces of 1 GiB, 18 ms in pieces of 64 MiB.
- A read-only mapping stops kernels (a fault of that process alone) and copies. It is a guard against mistakes, not against malice: the
  process may ask for more on what it has imported.
- From pinned memory: 55.5 GB/s with copies of 64 MiB, 55.0 with 16, 53.5 with 4; one stream is as fast as four.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from gpumem.hardware.memory import DeviceFull, MemoryFailed

_STREAMS = 4  # as many threads can each wait for their own copies
_UNMAPPED_ERRORS = ("CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_NOT_FOUND")
_EXTRA = "install zerowake with its extra `gpu`: pip install '.[gpu]' in a checkout of it"


def devices() -> list[str]:
    """The GPUs here, by UUID. Asks NVML: CUDA is not even initialised.

    Raises:
        MemoryFailed: the driver does not answer, or what asks it is not installed.
    """
    nvml = _nvml()
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [nvml.nvmlDeviceGetUUID(handle) for handle in handles]


class CudaMapped:
    """Memory that is mapped into this process's GPU addresses. Implements `gpumem.hardware.memory.Mapped`."""

    def __init__(self, memory: CudaMemory, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self._memory = memory
        self._open = True

    def close(self) -> None:
        """Waits for the device first: a kernel that still reads would take its whole process down."""
        if self._open:
            self._open = False
            self._memory.finish()
            _call(_driver().cuMemUnmap, self.address, self.size)


class CudaMemory:
    """One GPU, for this process. Implements `gpumem.hardware.memory.Memory`."""

    addressable = False
    streams = _STREAMS
    slab = 1 << 30

    def __init__(self, identity: str) -> None:
        """Raises MemoryFailed: no GPU of that UUID is visible to this process."""
        self.identity = identity
        driver = _driver()
        self._ordinal, self._device = _find(identity)
        self._property = driver.CUmemAllocationProp()
        self._property.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._property.requestedHandleTypes = _handle_type()
        self._property.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._property.location.id = self._ordinal
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(_call(driver.cuMemGetAllocationGranularity, self._property, minimum))
        self._context: Any = None
        self._streams: list[Any] = []
        self._lock = threading.Lock()

    def move(self, identity: str) -> None:
        self.identity = identity

    def free(self) -> tuple[int, int]:
        nvml = _nvml()
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(self.identity))
        except nvml.NVMLError as error:
            raise MemoryFailed(f"NVML does not tell the memory of {self.identity}: {error}") from None
        return memory.free, memory.total

    def create(self, size: int) -> int:
        driver = _driver()
        handle = _call(driver.cuMemCreate, size, self._property, 0)
        try:
            return int(_call(driver.cuMemExportToShareableHandle, handle, _handle_type(), 0))
        finally:
            _call(driver.cuMemRelease, handle)  # the descriptor keeps it

    def reserve(self, size: int) -> int:
        return int(_call(_driver().cuMemAddressReserve, size, 0, 0, 0))

    def unreserve(self, address: int, size: int) -> None:
        _call(_driver().cuMemAddressFree, address, size)

    def map(self, address: int, fd: int, size: int, writable: bool) -> CudaMapped:
        """The memory may be another GPU's; this one must then be able to reach it (NVLink, or PCIe peer access)."""
        driver = _driver()
        handle = _call(driver.cuMemImportFromShareableHandle, fd, _handle_type())
        try:
            _call(driver.cuMemMap, address, size, 0, handle, 0)
        finally:
            _call(driver.cuMemRelease, handle)  # the mapping keeps it
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self._ordinal
        flags = driver.CUmemAccess_flags
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        try:
            _call(driver.cuMemSetAccess, address, size, [access], 1)
        except MemoryFailed:
            _call(driver.cuMemUnmap, address, size)
            raise
        return CudaMapped(self, address, size)

    def is_mapped(self, address: int) -> bool:
        driver = _driver()
        code, handle = driver.cuMemRetainAllocationHandle(address)
        if code.name in _UNMAPPED_ERRORS:
            return False
        _check(driver.cuMemRetainAllocationHandle, code)
        _call(driver.cuMemRelease, handle)
        return True

    def seal(self, fd: int) -> None:
        """Does nothing: CUDA cannot. A sealed region stays as it is because the server lends it to nobody to write."""

    def pin(self, address: int, size: int) -> None:
        driver = _driver()
        with self._current():
            code = driver.cuMemHostRegister(address, size, 0)[0]
            if code.name == "CUDA_ERROR_INVALID_VALUE":  # what it says of memory that this process may only read
                code = driver.cuMemHostRegister(address, size, driver.CU_MEMHOSTREGISTER_READ_ONLY)[0]
            _check(driver.cuMemHostRegister, code)

    def copy_from_host(self, address: int, source: int, size: int, stream: int) -> None:
        with self._current():
            _call(_driver().cuMemcpyHtoDAsync, address, source, size, self._streams[stream])

    def copy(self, address: int, source: int, size: int, stream: int) -> None:
        with self._current():
            _call(_driver().cuMemcpyDtoDAsync, address, source, size, self._streams[stream])

    def synchronize(self, stream: int) -> None:
        with self._current():
            _call(_driver().cuStreamSynchronize, self._streams[stream])

    def finish(self) -> None:
        """Waits for all work of this process on the device, whoever gave it. Without a context there is none."""
        driver = _driver()
        _, active = _call(driver.cuDevicePrimaryCtxGetState, self._device)
        if active:
            with self._current():
                # Its code is not looked at: an earlier fault is reported to whoever gave that work, and keeps nothing from being unmapped.
                driver.cuCtxSynchronize()

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """The primary context, current for a call; whatever was current before is again after it."""
        driver = _driver()
        with self._lock:
            if self._context is None:
                self._context = _call(driver.cuDevicePrimaryCtxRetain, self._device)
        _call(driver.cuCtxPushCurrent, self._context)
        try:
            with self._lock:
                while len(self._streams) < _STREAMS:
                    self._streams.append(_call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
            yield
        finally:
            _call(driver.cuCtxPopCurrent)


@cache
def _nvml() -> Any:
    try:
        import pynvml  # noqa: PLC0415  (comes with the extra `gpu`)
    except ImportError:
        raise MemoryFailed(f"this machine has an NVIDIA driver, but nvidia-ml-py is not installed: {_EXTRA}") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise MemoryFailed(f"NVML does not answer: {error}; does nvidia-smi?") from None
    return pynvml


@cache
def _driver() -> Any:
    """The driver's functions, initialised. Raises MemoryFailed."""
    try:
        from cuda.bindings import driver  # noqa: PLC0415  (comes with the extra `gpu`)
    except ImportError:
        raise MemoryFailed(f"cuda-python is not installed: {_EXTRA}") from None
    try:
        code = driver.cuInit(0)[0]
    except RuntimeError as error:  # there is no libcuda to load
        raise MemoryFailed(str(error)) from None
    if code.name != "CUDA_SUCCESS":
        raise MemoryFailed(f"cuInit: {code.name}; does nvidia-smi answer?")
    return driver


def _handle_type() -> Any:
    return _driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _find(identity: str) -> tuple[int, Any]:
    driver = _driver()
    visible = []
    for ordinal in range(_call(driver.cuDeviceGetCount)):
        device = _call(driver.cuDeviceGet, ordinal)
        visible.append(f"GPU-{uuid.UUID(bytes=bytes(_call(driver.cuDeviceGetUuid, device).bytes)[:16])}")
        if visible[-1] == identity:
            return ordinal, device
    raise MemoryFailed(f"this process sees no GPU {identity}, only {', '.join(visible) or 'none'}; is CUDA_VISIBLE_DEVICES set?")


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns beside its code. Raises DeviceFull, MemoryFailed."""
    code, *values = function(*arguments)
    _check(function, code)
    return values[0] if len(values) == 1 else values


def _check(function: Callable[..., Any], code: Any) -> None:
    if code.name == "CUDA_ERROR_OUT_OF_MEMORY":
        raise DeviceFull(f"{function.__name__}: the GPU has no free memory of that size")
    if code.name != "CUDA_SUCCESS":
        raise MemoryFailed(f"{function.__name__}: {code.name} ({_driver().cuGetErrorString(code)[1].decode()})")
