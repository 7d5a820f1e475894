"""What a GPU is called: by device plugins, by drivers of claims (DRA), and in names of the Container Device Interface (CDI).

    GPU-1f0e…             its UUID                                   NVIDIA's device plugin, CDI, the attribute `uuid` of a ResourceSlice
    GPU-1f0e…::3          one of several that share it in time       the same plugin
    nvidia2, nvidia2/vgpu0   its device file, /dev/nvidia2           GKE's device plugin
    nvidia.com/gpu=2      its number in the order of the PCI bus     CDI
    MIG-9a…, nvidia0/gi1, nvidia.com/gpu=0:1    a slice of a GPU: CUDA's checkpoint knows none

Names of claims' CDI devices that hold only the claim's uid say nothing here: whoever reads them looks into the ResourceSlice instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from restore_agent.drivers.cuda import NodeGpu

_FILE = re.compile(r"nvidia(\d+)")
_SLICE = re.compile(r"MIG-.*|nvidia\d+/gi\d+.*|\d+:\d+")


def gpu_called(name: str, gpus: Sequence[NodeGpu]) -> str:
    """The UUID of the GPU of this node that goes by this name; empty: none does."""
    vendor, _, own = name.rpartition("=")
    whole = shared_by(own).partition("/")[0]
    file = _FILE.fullmatch(whole)
    for gpu in gpus:
        if whole == gpu.uuid or (file and int(file[1]) == gpu.minor) or (vendor and whole == str(gpu.index)):
            return gpu.uuid
    return ""


def shared_by(name: str) -> str:
    """A device that is shared in time has a name of its own for each of its users, behind the device's."""
    return name.partition("::")[0]


def is_slice(name: str) -> bool:
    """Whether it is a part of a GPU (MIG)."""
    return bool(_SLICE.fullmatch(name.rpartition("=")[2]))
