"""A torch model's weights as they are after loading, in a region of gpumem: published once, mapped by every later process.

Engines fuse, pad and repack what a checkpoint holds. What they end up with is written once as a checkpoint directory of its own; a region
is filled from that. Parameters are replaced by their storages, so that tensors which share one (ties, transposed views, buffers that show a
parameter in another shape) go on sharing it. Other buffers stay the process's own, since modules write to them. But a checkpoint may name
some, and what an engine makes a model of without reading one reaches them, too: what they held is kept beside the weights.

Weights that are kept where no module knows of them would be missed. So whatever was taken of the GPU while the model was loaded has to be
found again: `held` raises StaleLayout where it is not, and the process keeps its own.
"""

from __future__ import annotations

import gc
import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor

from gpumem.checkpoint.safetensors import PADDING, Checkpoint, byte_size, keep_reading, read_checkpoint, write_checkpoint
from gpumem.client import Client, Region, StaleLayout
from gpumem.client.torch import bytes_at, dtype_name, torch_device

SMALL = 64 << 10  # bytes; tensors below it that are no parameters are constants, and stay where they are
_PIECE = 64 << 20  # bytes
_BUFFERS = "buffers.pt"  # a file beside the weights


@dataclass
class Held:
    """A storage, and every live tensor on it."""

    name: str
    storage: Any
    tensors: list[Any] = field(default_factory=list)

    def entry(self) -> tuple[str, str, list[int]]:
        """As a checkpoint has it: the first tensor, where it is all of the storage as it lies there; else bytes."""
        first, size = self.tensors[0], self.storage.nbytes()
        if first.is_contiguous() and first.numel() * first.element_size() == size and (name := dtype_name(first.dtype)):
            return self.name, name, list(first.shape)
        return self.name, "U8", [size]


def addresses(client: Client) -> set[int]:
    """Of all storages that are on the client's device now: before a model is loaded, for `held`."""
    return {tensor.untyped_storage().data_ptr() for tensor in _live(torch_device(client.device).type)}


def held(client: Client, model: Any, before: set[int]) -> list[Held]:
    """The storages of a model's weights. Raises StaleLayout: memory was taken for tensors that no module knows."""
    gc.collect()
    device = torch_device(client.device).type
    found: dict[int, Held] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if parameter.device.type == device}
    buffers = {buffer.untyped_storage().data_ptr() for buffer in model.buffers() if buffer.device.type == device} - parameters
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *_attributes(model, device)):
        storage = tensor.untyped_storage()
        if tensor.device.type == device and storage.nbytes() and storage.data_ptr() not in buffers:
            found.setdefault(storage.data_ptr(), Held(name, storage)).tensors.append(tensor)
    known = {id(tensor) for each in found.values() for tensor in each.tensors}
    for tensor in _live(device):
        storage = tensor.untyped_storage()
        if (each := found.get(storage.data_ptr())) is not None:
            if id(tensor) not in known:
                each.tensors.append(tensor)
        elif storage.nbytes() >= SMALL and storage.data_ptr() not in buffers | before:
            raise StaleLayout(f"{tuple(tensor.shape)} of {tensor.dtype} was made while loading and belongs to no module of the model")
    return list(found.values())


def fits(checkpoint: Checkpoint, weights: list[Held]) -> bool:
    """Whether a model that was made without its weights has room for exactly these."""
    there = {tensor.name: byte_size(tensor) for tensor in checkpoint.layout.tensors if not tensor.name.startswith(PADDING)}
    return there == {each.name: each.storage.nbytes() for each in weights}


def fill_buffers(model: Any, directory: Path) -> None:
    """What they held as the weights were published. Raises StaleLayout: the model has other ones."""
    kept, there = torch.load(directory / _BUFFERS, weights_only=True), _buffers(model)
    if kept.keys() != there.keys():
        raise StaleLayout(f"{directory} has other buffers than the model: remove it, and it is written anew")
    for name, buffer in there.items():
        buffer.copy_(kept[name])


def publish(directory: Path, model: Any, weights: list[Held]) -> Checkpoint:
    """Writes a model's weights as they are now, and its buffers. Where another process was faster, its are taken: they are the same.

    Raises OSError.
    """
    storages = {each.name: each.storage for each in weights}
    stage = torch.empty(_PIECE, dtype=torch.uint8)

    def content(name: str) -> Iterator[memoryview]:
        data = torch.empty(0, dtype=torch.uint8, device=storages[name].device).set_(storages[name])
        for at in range(0, len(data), _PIECE):
            count = min(_PIECE, len(data) - at)
            stage[:count].copy_(data[at : at + count])
            yield memoryview(stage.numpy())[:count]

    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_checkpoint(directory, [each.entry() for each in weights], content)
    except OSError:
        if not directory.exists():
            raise
    checkpoint = read_checkpoint(directory)
    fresh = directory / f".{_BUFFERS}.{secrets.token_hex(4)}"  # several engines may publish the same weights at once
    torch.save({name: buffer.cpu() for name, buffer in _buffers(model).items()}, fresh)
    fresh.rename(directory / _BUFFERS)
    keep_reading(directory, checkpoint)
    return checkpoint


def adopt(region: Region, weights: list[Held]) -> None:
    """Makes every tensor a view of the region. Raises StaleLayout: the region holds something else; nothing has changed then."""
    there = {tensor.name: tensor for tensor in region.layout.tensors}
    for each in weights:
        if each.name not in there or byte_size(there[each.name]) != each.storage.nbytes():
            raise StaleLayout(
                f"the region has no {each.name!r} of {each.storage.nbytes()} bytes: remove its checkpoint directory, and it is written anew"
            )
    for each in weights:
        memory = bytes_at(region.address + there[each.name].offset, each.storage.nbytes(), region.device)  # a storage of its own
        for tensor in each.tensors:
            whole = memory[: len(memory) // tensor.element_size() * tensor.element_size()].view(tensor.dtype)
            tensor.data = whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def weight_files(model: Path) -> list[tuple[str, int, int]]:
    """The files of a model's own folder that hold weights: name, size and time of change."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in model.glob("*.*") if file.is_file())
    return [file for file in files if file[0].endswith((".safetensors", ".bin", ".pt", ".gguf"))]


def directory_name(model: str, facts: list[object]) -> str:
    """The same for processes that would end up with the same weights, which is what `facts` have to say."""
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]
    return f"{''.join(letter if letter.isalnum() else '-' for letter in Path(model).name.lower())}-{digest}"


def _live(device: str) -> list[Any]:
    """Every tensor of this process that has memory on such a device."""
    found = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not isinstance(each, FakeTensor))
    return [each for each in found if each.device.type == device and each.layout is torch.strided]


def _attributes(model: Any, device: str) -> Iterator[tuple[str, Any]]:
    """Tensors that modules keep beside parameters and buffers, such as what latent attention makes of its projections."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            yield from _inside(f"{prefix}.{name}", value, device)
        for name, value in getattr(getattr(module, "quant_method", None), "__dict__", {}).items():
            yield from _inside(f"{prefix}.quant_method.{name}", value, device)


def _inside(name: str, value: Any, device: str) -> Iterator[tuple[str, Any]]:
    """A tensor, or those that Triton's kernels wrap: experts of 4 bits and their scales."""
    if isinstance(value, torch.Tensor):
        if value.device.type == device and value.untyped_storage().nbytes() >= SMALL:
            yield name, value
    elif "triton_kernels" in type(value).__module__ and not isinstance(value, type):
        for inner, wrapped in getattr(value, "__dict__", {}).items():
            yield from _inside(f"{name}.{inner}", wrapped, device)


def _buffers(model: Any) -> dict[str, Any]:
    """Those that a checkpoint may name; others are computed."""
    named = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in named}
