"""vLLM on lent memory: its weights in a region, its KV cache and what its CUDA graphs compute in scratch.

    vllm serve MODEL --worker-cls restore_agent.workload.vllm.worker.Worker --load-format gpumem --kv-cache-memory-bytes 8G
        --gpu-memory-utilization 0.05
        --model-loader-extra-config '{"checkpoints": "/var/lib/zerowake/weights", "load_format": "auto"}'

All through vLLM's own extension points: a worker class, a load format that this module registers, and (platform.py) a platform
plugin. tests/engines/ looks whether they are there, and what we take them for, in every released vLLM from 0.23 on. `/sleep` and
`/wake_up`, or whoever calls them inside, then let go of all of it and take it back at the same addresses.

vLLM fuses, pads and repacks what a checkpoint holds. What it ends up with is written once, per model, version and share, as a checkpoint
directory of its own under `checkpoints`; a region of gpumem is filled from that, and each later process maps it. A model that is not
quantized is then not loaded at all: its parameters are made with dummy content, which is dropped for views of the region. Quantized ones
are loaded as always, since numbers of Python's (scales) come out of their processing too, and dropped for the region afterwards. Either
takes the room of the weights twice for a moment, before there is a KV cache.

Parameters are replaced by their storages, so that tensors which share one (ties, transposed views, buffers that show a parameter in another
shape) go on sharing it. Weights that are kept where no module knows of them would be missed: then the process keeps its own, says so, and
they travel in its image. Dummy content reaches buffers, too, since a checkpoint may name some: what they held is kept beside the weights.
Rejected: vLLM's sleep mode, which copies 16 GB to the host and back; its allocator for the KV cache, a piece a layer instead of one.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import vllm
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker import gpu_worker

from gpumem.checkpoint.safetensors import Checkpoint, byte_size, keep_reading, kept_reading, read_checkpoint, write_checkpoint
from gpumem.client import Client, Region, StaleLayout
from gpumem.client.torch import ScratchPool, bytes_at, dtype_name
from restore_agent.workload.vllm import sampler_tables
from restore_agent.workload.vllm.collectives import restrict
from restore_agent.workload.vllm.kv_cache import allocations

LOAD_FORMAT = "gpumem"
_EDITION = 2  # of what is written: another one is written anew
_SMALL = 64 << 10  # bytes; tensors below it that are no parameters are constants, and stay where they are
_PIECE = 64 << 20  # bytes
_BUFFERS = "buffers.pt"  # a file beside the weights
_log = init_logger("vllm.gpumem")  # below vLLM's own, so that it is shown
_directories: list[Path] = []  # whose regions this process has attached


@cache
def client() -> Client:
    """This process's, for the GPU that torch uses. Raises PeerGone, WrongDevice."""
    return Client(device=f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}", label="vllm")


@cache
def graph_pool() -> ScratchPool:
    """Where CUDA graphs keep what they compute. Its memory has no content that would have to outlive a replay."""
    return ScratchPool(client())


class Worker(gpu_worker.Worker):  # type: ignore[misc, unused-ignore]
    """vLLM's own, with the KV cache and the sampler's tables in scratch; asleep it holds nothing of gpumem's."""

    _moved: Mapping[str, str] | None = None

    def init_device(self) -> None:
        restrict(self.vllm_config, os.environ)
        super().init_device()

    def determine_available_memory(self) -> int:
        if not self.cache_config.kv_cache_memory_bytes:
            raise ValueError("the KV cache lies in gpumem's memory, which vLLM cannot measure: say how much with --kv-cache-memory-bytes")
        return int(super().determine_available_memory())

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        sizes = allocations(kv_cache_config.kv_cache_tensors)
        tables = [table.nbytes for table in sampler_tables.tables(self.model_runner)]
        memory = ScratchPool(client(), sum(map(ScratchPool.rounded, [*sizes, *tables])))
        sampler_tables.move(self.model_runner, lambda table: _piece(memory, table.nbytes).view(table.dtype).view(table.shape))
        torch.cuda.empty_cache()
        _log.info("%d MiB of KV cache and %d MiB of the sampler's tables are scratch", sum(sizes) >> 20, sum(tables) >> 20)
        with _CacheMemory(sizes, memory):
            super().initialize_from_config(kv_cache_config)

    def checkpoints(self) -> dict[str, str]:
        """The directories whose regions hold this worker's weights, each with the GPU that they are lent on."""
        return {str(directory): client().device for directory in _directories}

    def move(self, moved: Mapping[str, str]) -> None:
        """The next wake-up is on other GPUs: old UUID → new one."""
        self._moved = moved

    def sleep(self, level: int = 1) -> None:
        """Whatever the level: weights and KV cache are lent, and there is nothing that would be copied to the host."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        gc.collect()
        torch.cuda.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()
        client().quiesce()
        ctypes.CDLL(None).malloc_trim(0)
        _log.info(
            "torch held %d MiB, %d of them in use; asleep %d and %d, of which %d of CUDA graphs are scratch and gone",
            *(size >> 20 for size in (*before, torch.cuda.memory_reserved(), torch.cuda.memory_allocated(), graph_pool().size)),
        )

    def wake_up(self, tags: list[str] | None = None) -> None:
        """All of it, whatever the tags. The KV cache is empty; its books in the scheduler were cleared when it fell asleep."""
        begin = time.perf_counter()
        client().resume(moved=self._moved)
        self._moved = None
        _log.info("attached again in %.1f ms", (time.perf_counter() - begin) * 1000)


@register_model_loader(LOAD_FORMAT)
class Loader(BaseModelLoader):  # type: ignore[misc, unused-ignore]
    """Maps what another process loaded, or loads it by the original format for all that follow."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        extra = dict(load_config.model_loader_extra_config)
        if not (where := extra.pop("checkpoints", "")):
            raise ValueError("--load-format gpumem wants --model-loader-extra-config '{\"checkpoints\": DIRECTORY}'")
        self._checkpoints = Path(where)
        self._original = copy(load_config)
        self._original.load_format = extra.pop("load_format", "auto")
        self._original.model_loader_extra_config = extra

    def download_model(self, model_config: Any) -> None:
        get_model_loader(self._original).download_model(model_config)

    def load_weights(self, model: Any, model_config: Any) -> None:
        raise NotImplementedError(
            "weights that gpumem lends are shared and read-only: start vLLM without --load-format gpumem to change them"
        )

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        directory = self._checkpoints / _name(vllm_config, model_config, self._original)
        known = kept_reading(directory)
        original = copy(self._original)
        if known and model_config.quantization is None and vllm_config.cache_config.cache_dtype == "auto":
            original.load_format, original.model_loader_extra_config = "dummy", {}
        before = {tensor.untyped_storage().data_ptr() for tensor in _live()}
        begin = time.perf_counter()
        model = get_model_loader(original).load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        if known and original.load_format == "dummy":
            _fill_buffers(model, directory)
        loaded = time.perf_counter()
        try:
            held = _held(model, before)
        except StaleLayout as error:
            if known and original.load_format == "dummy" != self._original.load_format:
                raise
            _log.warning("the weights stay in this process's own memory: %s", error)
            return model
        checkpoint = known or _publish(directory, held, _buffers(model))
        lent = client().fill(checkpoint.layout, checkpoint.parts)
        filled = time.perf_counter()
        region = client().attach(lent.id, lent.capability)
        _adopt(region, held)
        _directories.append(directory)
        del held
        gc.collect()
        torch.cuda.empty_cache()
        _log.info(
            "%d MiB of weights are lent by gpumem (%s): made as %s in %.2f s, published and filled in %.2f s, attached in %.2f s",
            checkpoint.layout.size >> 20, directory, original.load_format,
            loaded - begin, filled - loaded, time.perf_counter() - filled,
        )  # fmt: skip
        return model


@dataclass
class _Held:
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


def _live() -> list[Any]:
    """Every tensor of this process that has memory on the GPU."""
    found = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and not isinstance(each, FakeTensor))
    return [each for each in found if each.is_cuda and each.layout is torch.strided]


def _held(model: Any, before: set[int]) -> list[_Held]:
    """The storages of a model's weights. Raises StaleLayout: memory was taken for tensors that no module knows."""
    gc.collect()
    found: dict[int, _Held] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if parameter.is_cuda}
    buffers = {buffer.untyped_storage().data_ptr() for buffer in model.buffers() if buffer.is_cuda} - parameters
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *_attributes(model)):
        storage = tensor.untyped_storage()
        if tensor.is_cuda and storage.nbytes() and storage.data_ptr() not in buffers:
            found.setdefault(storage.data_ptr(), _Held(name, storage)).tensors.append(tensor)
    known = {id(tensor) for held in found.values() for tensor in held.tensors}
    for tensor in _live():
        storage = tensor.untyped_storage()
        if (held := found.get(storage.data_ptr())) is not None:
            if id(tensor) not in known:
                held.tensors.append(tensor)
        elif storage.nbytes() >= _SMALL and storage.data_ptr() not in buffers | before:
            raise StaleLayout(f"{tuple(tensor.shape)} of {tensor.dtype} was made while loading and belongs to no module of the model")
    return list(found.values())


def _attributes(model: Any) -> Iterator[tuple[str, Any]]:
    """Tensors that modules keep beside parameters and buffers, such as what latent attention makes of its projections."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            yield from _inside(f"{prefix}.{name}", value)
        for name, value in getattr(getattr(module, "quant_method", None), "__dict__", {}).items():
            yield from _inside(f"{prefix}.quant_method.{name}", value)


def _inside(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A tensor, or those that Triton's kernels wrap: experts of 4 bits and their scales."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda and value.untyped_storage().nbytes() >= _SMALL:
            yield name, value
    elif "triton_kernels" in type(value).__module__ and not isinstance(value, type):
        for inner, wrapped in getattr(value, "__dict__", {}).items():
            yield from _inside(f"{name}.{inner}", wrapped)


def _buffers(model: Any) -> dict[str, Any]:
    """Those that a checkpoint may name; others are computed."""
    named = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in named}


def _fill_buffers(model: Any, directory: Path) -> None:
    """Raises StaleLayout: the model has other ones."""
    kept, buffers = torch.load(directory / _BUFFERS, weights_only=True), _buffers(model)
    if kept.keys() != buffers.keys():
        raise StaleLayout(f"{directory} has other buffers than the model: remove it, and it is written anew")
    for name, buffer in buffers.items():
        buffer.copy_(kept[name])


def _publish(directory: Path, held: list[_Held], buffers: Mapping[str, Any]) -> Checkpoint:
    """Writes the weights as they are now. Where another process was faster, its are taken: they are the same."""
    storages = {each.name: each.storage for each in held}
    stage = torch.empty(_PIECE, dtype=torch.uint8)

    def content(name: str) -> Iterator[memoryview]:
        data = torch.empty(0, dtype=torch.uint8, device=storages[name].device).set_(storages[name])
        for at in range(0, len(data), _PIECE):
            count = min(_PIECE, len(data) - at)
            stage[:count].copy_(data[at : at + count])
            yield memoryview(stage.numpy())[:count]

    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_checkpoint(directory, [each.entry() for each in held], content)
    except OSError:
        if not directory.exists():
            raise
    checkpoint = read_checkpoint(directory)
    torch.save({name: buffer.cpu() for name, buffer in buffers.items()}, directory / _BUFFERS)
    keep_reading(directory, checkpoint)
    return checkpoint


def _adopt(region: Region, held: list[_Held]) -> None:
    """Makes every tensor a view of the region. Raises StaleLayout: the region holds something else; nothing has changed then."""
    there = {tensor.name: tensor for tensor in region.layout.tensors}
    for each in held:
        if each.name not in there or byte_size(there[each.name]) != each.storage.nbytes():
            raise StaleLayout(
                f"the region has no {each.name!r} of {each.storage.nbytes()} bytes: remove its checkpoint directory, and it is written anew"
            )
    for each in held:
        memory = bytes_at(region.address + there[each.name].offset, each.storage.nbytes(), region.device)  # a storage of its own
        for tensor in each.tensors:
            whole = memory[: len(memory) // tensor.element_size() * tensor.element_size()].view(tensor.dtype)
            tensor.data = whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _name(vllm_config: Any, model_config: Any, original: Any) -> str:
    """The same for processes that would end up with the same weights."""
    model = Path(model_config.model)
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in model.glob("*.*") if file.is_file())
    weights = [file for file in files if file[0].endswith((".safetensors", ".bin", ".pt", ".gguf"))]
    cache, hf_config = vllm_config.cache_config, model_config.hf_config
    facts = [
        _EDITION, vllm.__version__, torch.__version__, torch.cuda.get_device_capability(),
        model_config.model, model_config.revision, getattr(hf_config, "_commit_hash", None), hf_config.to_json_string(), weights,
        str(model_config.dtype), model_config.quantization, str(cache.cache_dtype),
        original.load_format, original.model_loader_extra_config,
        get_tp_group().rank_in_group, get_tp_group().world_size, get_pp_group().rank_in_group, get_pp_group().world_size,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]
    return f"{''.join(letter if letter.isalnum() else '-' for letter in model.name.lower())}-{digest}"


def _piece(memory: ScratchPool, size: int) -> Any:
    """So many bytes of it."""
    return bytes_at(memory.allocate(size), size, client().device)


class _CacheMemory(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Within it, the KV cache's tensors, which are known by their type and size, are pieces of one scratch."""

    def __init__(self, sizes: list[int], memory: ScratchPool) -> None:
        super().__init__()
        self._least = min(sizes, default=0)
        self._memory = memory
        self._taken = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        bytes_of_cache = function is torch.zeros and kwargs.get("dtype") is torch.int8 and len(args) == 1 and isinstance(args[0], int)
        if not bytes_of_cache or not 0 < self._least <= args[0]:
            return function(*args, **kwargs)
        self._taken += args[0]
        return _piece(self._memory, args[0]).view(torch.int8)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self._least and not self._taken:
            raise RuntimeError(
                f"vLLM {vllm.__version__} makes its KV cache in a way that zerowake's adapter does not know, and it would be in the image: "
                "use a vLLM that it fits (restore_agent/README.md names them), or take the snapshot without --engine vllm"
            )
