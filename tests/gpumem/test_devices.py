"""Which devices there are: a GPU's memory is never mistaken for the host's."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumem.hardware.devices import devices, open_memory
from gpumem.hardware.host import HostMemory
from gpumem.hardware.memory import HOST, MemoryFailed


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has GPUs")
def test_a_machine_without_a_gpu_has_its_hosts_memory() -> None:
    assert devices() == [HOST]


def test_the_hosts_memory_is_always_there() -> None:
    assert isinstance(open_memory(HOST), HostMemory)


@pytest.mark.parametrize("identity", ["GPU-00000000-0000-0000-0000-000000000000", "", "cuda:0"])
def test_a_device_that_is_not_there_is_refused(identity: str) -> None:
    with pytest.raises(MemoryFailed):
        open_memory(identity)
