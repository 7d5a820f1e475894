"""A machine with a GPU's devices and without its driver's libraries, as a container is that asked for none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from restore_agent.drivers import cuda
from restore_agent.drivers.cuda import Cuda, CudaError


class NVMLError(Exception):
    """As pynvml's."""


@pytest.mark.parametrize("missing", ["libcuda", "libnvidia-ml"])
def test_a_driver_without_its_libraries_is_said(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(flags: int) -> tuple[int]:
        if missing == "libcuda":
            raise RuntimeError("libcuda is not found")
        return (0,)

    def nvml_init() -> None:
        raise NVMLError("libnvidia-ml is not found")

    bindings, pynvml = ModuleType("cuda.bindings"), ModuleType("pynvml")
    monkeypatch.setattr(bindings, "driver", SimpleNamespace(cuInit=init), raising=False)
    monkeypatch.setattr(pynvml, "NVMLError", NVMLError, raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", nvml_init, raising=False)
    for name, module in {"cuda": ModuleType("cuda"), "cuda.bindings": bindings, "pynvml": pynvml}.items():
        monkeypatch.setitem(sys.modules, name, module)
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr(cuda, "_DRIVER", device)
    with pytest.raises(CudaError, match=rf"{missing} is not found; a container has it by NVIDIA's container runtime"):
        Cuda.find()
    device.unlink()
    assert Cuda.find() is None
