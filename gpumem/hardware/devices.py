"""Which devices a machine has, and the memory of each: the one place that chooses between `host.py` and `cuda.py`.

`cuda.py` is imported only for a GPU: an engine without one should load no more than it uses.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from gpumem.hardware.host import HostMemory, HugePagesOn
from gpumem.hardware.memory import HOST, Memory


def devices() -> list[str]:
    """The GPUs of this machine by UUID, or `host` alone where there is none. Makes no CUDA context.

    Raises:
        MemoryFailed: there are GPUs, and what is needed to use them is not installed.
    """
    if not Path("/dev/nvidiactl").exists():
        return [HOST]
    from gpumem.hardware import cuda  # noqa: PLC0415

    return cuda.devices()


def open_memory(identity: str, huge_pages: HugePagesOn = contextlib.nullcontext) -> Memory:
    """The memory of a device for this process. A GPU's primary context is made when the first copy asks for it.

    Args:
        huge_pages: as `HostMemory` takes it; for whoever makes memory of the host's.

    Raises:
        MemoryFailed: no such device here.
    """
    if identity == HOST:
        return HostMemory(huge_pages=huge_pages)
    from gpumem.hardware.cuda import CudaMemory  # noqa: PLC0415

    return CudaMemory(identity)
