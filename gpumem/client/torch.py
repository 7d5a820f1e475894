"""A torch module's parameters in a gpumem region: written there once, mapped by every other process without a copy.

    writer:  publish(client, device, model)          the parameters move into a new region, which is then sealed
    reader:  with skeleton(): model = Model()        no parameter is made; what is computed (rotary tables, masks) is
             adopt(model, region)                    each parameter is now a view of the region

Buffers stay private to the process, since modules write to them; what a checkpoint holds of them is copied. Parameters keep their
addresses through quiesce and resume, so CUDA graphs that read them stay valid; they are read-only, so they take no gradient.

`skeleton` sends `torch.empty` alone to the meta device, since that is how modules make what they then initialise or load; rejected:
building everything there, which loses computed buffers, and patching `register_parameter`, which makes each parameter before dropping it.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from zerowake_proto import gpumem_pb2

from gpumem.client.client import Client
from gpumem.hardware.memory import HOST
from gpumem.wire.errors import StaleLayout

_GRANULE = 2 << 20  # bytes; the size of torch's smallest segments, and of GPU pages
_ALIGNMENT = 256  # bytes; what torch's own allocator promises kernels, and more
_DTYPES: dict[str, Any] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
    "C64": torch.complex64,
}  # fmt: skip
_INITIALISERS = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "fill_", "zero_")
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Region(Protocol):
    """The part of a mapped region that this file uses."""

    @property
    def address(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def layout(self) -> gpumem_pb2.Layout: ...


class skeleton(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Within it, `torch.empty` makes tensors that have no memory: parameters cost nothing. What is computed is real."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            return function(*args, **kwargs | {"device": "meta"})
        # Initialising nothing is nothing; the meta device would import half of torch's compiler to find that out.
        if function.__name__ in _INITIALISERS and (target := args[0] if args else kwargs["tensor"]).is_meta:
            return target
        return function(*args, **kwargs)


def tensors(region: Region) -> dict[str, Any]:
    """Every tensor of a region by name, as a view of the mapped memory: valid while it is mapped."""
    memory = bytes_at(region.address, region.layout.size, region.device)
    return {tensor.name: _view(memory, tensor) for tensor in region.layout.tensors}


def bytes_at(address: int, size: int, identity: str) -> Any:
    """Mapped memory as a tensor of bytes."""
    device = torch_device(identity)
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)
    return torch.as_tensor(_Bytes(address, size), device=device)


def adopt(module: Any, region: Region) -> None:
    """Makes every parameter of a module a view of the region, and copies what the region holds of its buffers.

    Raises:
        StaleLayout: a parameter is missing in the region, or has another shape or type there; or something of the module is
            still without content. The module is unusable then.
    """
    held = tensors(region)
    for names, parameter in _parameters(module):
        name = next((name for name in names if name in held), None)
        if name is None:
            raise StaleLayout(f"the region has no tensor {names[0]!r}: it holds another model's weights, or another version's")
        view = held[name]
        if view.shape != parameter.shape or view.dtype != parameter.dtype:
            raise StaleLayout(
                f"tensor {name!r} is {tuple(view.shape)} of {view.dtype} in the region, {tuple(parameter.shape)} of {parameter.dtype} "
                f"in the module; publish the region again with this version"
            )
        _replace(module, names, view)
    device = torch_device(region.device)
    for name, buffer in list(module.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        if name in held:
            private = held[name].clone()
        elif buffer.is_meta:
            raise StaleLayout(f"buffer {name!r} has no content: the module makes it by torch.empty, and the region does not hold it")
        else:
            private = buffer.to(device)
        module.get_submodule(owner)._buffers[attribute] = private


def layout_of(module: Any) -> gpumem_pb2.Layout:
    """The module's parameters one behind the other; those shared by several names once, under the first."""
    layout = gpumem_pb2.Layout()
    for names, parameter in _parameters(module):
        layout.size += -layout.size % _ALIGNMENT
        if parameter.dtype not in _NAMES:
            raise StaleLayout(f"parameter {names[0]!r} is of {parameter.dtype}, which a layout cannot name")
        layout.tensors.add(name=names[0], dtype=_NAMES[parameter.dtype], shape=list(parameter.shape), offset=layout.size)
        layout.size += parameter.numel() * parameter.element_size()
    return layout


def fill(module: Any, region: Region) -> None:
    """Copies a module's parameters into a region that is mapped writable, made of `layout_of(module)`; returns when they are there."""
    held = tensors(region)
    for names, parameter in _parameters(module):
        held[names[0]].copy_(parameter.detach())
        _replace(module, names, held[names[0]])
    if torch_device(region.device).type == "cuda":
        torch.cuda.synchronize(torch_device(region.device))


def dtype_name(dtype: Any) -> str | None:
    """As checkpoints and layouts name an element type; None: they have no name for it."""
    return _NAMES.get(dtype)


class ScratchPool:
    """Hands out scratch piece by piece, and takes none back. Its `id` names a memory pool of torch's that allocates from it.

    What torch allocates in that pool needs no content: it is zeros after each quiesce and resume. That holds of memory taken while CUDA
    graphs are captured, since nothing runs then: whatever a replay reads of it, the replay has written before.
    """

    STEP = 256 << 20  # bytes; how much more scratch is taken when there is not enough

    def __init__(self, client: Client, size: int = 0) -> None:
        """Takes `size` bytes at once. Raises OutOfMemory, PeerGone."""
        self._client = client
        self._at = self._end = 0
        self.size = 0  # bytes, of all scratch
        self._pool: Any = None
        if size:
            self._grow(size)

    @staticmethod
    def rounded(size: int) -> int:
        """What a piece of that size takes."""
        return -(-size // _GRANULE) * _GRANULE

    def allocate(self, size: int) -> int:
        """The address of so many bytes. Raises OutOfMemory, PeerGone."""
        size = self.rounded(size)
        if self._end - self._at < size:
            self._grow(max(size, self.STEP))
        self._at += size
        return self._at - size

    @property
    def id(self) -> Any:
        """As `torch.cuda.graph(pool=…)` takes it."""
        if self._pool is None:
            allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)(self._allocate)
            free = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)(lambda *_: None)
            pointers = [ctypes.cast(function, ctypes.c_void_p).value for function in (allocate, free)]
            self._pool = torch.cuda.MemPool(torch._C._cuda_customAllocator(*pointers))
            for kept in (allocate, free, self._pool):  # torch calls these while the interpreter ends, too
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        return self._pool.id

    def _allocate(self, size: int, device: int, stream: int) -> int | None:
        try:
            return self.allocate(size)
        except Exception:
            traceback.print_exc()  # torch says only that there is no memory
            return None

    def _grow(self, size: int) -> None:
        scratch = self._client.scratch(size)
        self._at, self._end = scratch.address, scratch.address + scratch.mapped_size
        self.size += scratch.mapped_size


def torch_device(identity: str) -> Any:
    """torch's name for a device of gpumem. Raises ValueError: torch does not see that GPU."""
    if identity == HOST:
        return torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        if f"GPU-{torch.cuda.get_device_properties(index).uuid}" == identity:
            return torch.device("cuda", index)
    raise ValueError(f"torch sees no GPU {identity}; is CUDA_VISIBLE_DEVICES set?")


class _Bytes:
    """Device memory as numba, cupy and torch describe it to each other."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}


def _view(memory: Any, tensor: gpumem_pb2.Tensor) -> Any:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise StaleLayout(f"tensor {tensor.name!r} is of type {tensor.dtype}, which is not known here")
    count = dtype.itemsize
    for n in tensor.shape:
        count *= n
    return memory[tensor.offset : tensor.offset + count].view(dtype).view(tuple(tensor.shape))


def _parameters(module: Any) -> Iterator[tuple[list[str], Any]]:
    """Each parameter once, with all its names."""
    found: dict[int, tuple[list[str], Any]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    yield from found.values()


def _replace(module: Any, names: list[str], view: Any) -> None:
    parameter = torch.nn.Parameter(view, requires_grad=False)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner)._parameters[attribute] = parameter
