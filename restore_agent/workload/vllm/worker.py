"""vLLM on lent memory: its weights in a region, its KV cache and what its CUDA graphs compute in scratch.

    vllm serve MODEL --worker-cls restore_agent.workload.vllm.worker.Worker --load-format gpumem --gpu-memory-utilization 0.05
        --model-loader-extra-config '{"checkpoints": "/var/lib/zerowake/weights", "load_format": "auto"}'

All through vLLM's own extension points: a worker class, a load format that this module registers, and (platform.py) a platform
plugin. tests/engines/ looks whether they are there, and what we take them for, in every released vLLM from 0.23 on. `/sleep` and
`/wake_up`, or whoever calls them inside, then let go of all of it and take it back at the same addresses.

vLLM fuses, pads and repacks what a checkpoint holds. What it ends up with is written once, per model, version and share, as a checkpoint
directory of its own under `checkpoints`; a region of gpumem is filled from that, and each later process maps it. A model that is not
quantized is then not loaded at all: its parameters are made with dummy content, which is dropped for views of the region. Quantized ones
are loaded as always, since numbers of Python's (scales) come out of their processing too, and dropped for the region afterwards. Either
takes the room of the weights twice for a moment, before there is a KV cache.

What is a weight, and what becomes of buffers, is in lent_weights.py. Weights that are kept where no module knows of them would be missed:
then the process keeps its own, says so, and they travel in its image.
Rejected: vLLM's sleep mode, which copies 16 GB to the host and back; its allocator for the KV cache, a piece a layer instead of one.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
import vllm
from torch.overrides import TorchFunctionMode
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.sample.ops.topk_topp_triton import reset_buffer_cache
from vllm.v1.worker import gpu_worker

from gpumem.checkpoint.safetensors import kept_reading
from gpumem.client import Client, StaleLayout
from gpumem.client.torch import ScratchPool, bytes_at
from restore_agent.workload import lent_memory
from restore_agent.workload.control_directory import ControlDirectory
from restore_agent.workload.lent_weights import addresses, adopt, directory_name, fill_buffers, held, publish, weight_files
from restore_agent.workload.vllm import sampler_tables
from restore_agent.workload.vllm.all_reduce import AllReduce
from restore_agent.workload.vllm.collectives import restrict
from restore_agent.workload.vllm.kv_cache import allocations, longest_request, usual_bytes

LOAD_FORMAT = "gpumem"
_EDITION = 2  # of what is written: another one is written anew
_log = init_logger("vllm.gpumem")  # below vLLM's own, so that it is shown
_directories: list[Path] = []  # whose regions this process has attached


def client() -> Client:
    """This process's. Raises PeerGone, WrongDevice."""
    return lent_memory.client("vllm")


def graph_pool() -> ScratchPool:
    """Where this process's CUDA graphs compute."""
    return lent_memory.graph_pool(client())


class Worker(gpu_worker.Worker):  # type: ignore[misc, unused-ignore]
    """vLLM's own, with the KV cache and the sampler's tables in scratch; asleep it holds nothing of gpumem's."""

    _moved: Mapping[str, str] | None = None
    _meeting = b""

    def init_device(self) -> None:
        parallel = self.vllm_config.parallel_config
        over_peer_memory = parallel.tensor_parallel_size > 1 and not parallel.disable_custom_all_reduce
        restrict(self.vllm_config, os.environ)
        super().init_device()
        if control := ControlDirectory.from_environment():
            control.announce()
        if over_peer_memory:
            AllReduce.install(client())

    def determine_available_memory(self) -> int:
        if not self.cache_config.kv_cache_memory_bytes:  # by itself it measures what is free, and gpumem's memory is not
            longest = longest_request(self.get_kv_cache_spec().values(), self.vllm_config)
            self.cache_config.kv_cache_memory_bytes = usual_bytes(longest)
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

    def move(self, moved: Mapping[str, str], meeting: str) -> None:
        """Of the next wake-up: GPUs that have others in their place (old UUID → new one), and what all ranks that share memory are told."""
        self._moved, self._meeting = moved, meeting.encode()

    def renew(self) -> None:
        """Makes its random state anew while it sleeps, so that its wake need not."""
        if control := ControlDirectory.from_environment():
            control.renew()

    def sleep(self, level: int = 1) -> None:
        """Whatever the level: weights and KV cache are lent, and there is nothing that would be copied to the host.

        What top-k and top-p were last computed in, 76 MiB for 151,936 words, is dropped. The next request that wants them makes it anew.
        """
        before, after = lent_memory.let_go(client(), forget=reset_buffer_cache)
        _log.info("torch held %s; asleep %s, and %d MiB of CUDA graphs' scratch are gone", before, after, graph_pool().size >> 20)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """All of it, whatever the tags. The KV cache is empty; its books in the scheduler were cleared when it fell asleep."""
        begin = time.perf_counter()
        self.renew()
        lent_memory.take_back(client(), self._moved or {}, self._meeting)
        self._moved, self._meeting = None, b""
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
        before = addresses(client())
        begin = time.perf_counter()
        model = get_model_loader(original).load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        if known and original.load_format == "dummy":
            fill_buffers(model, directory)
        loaded = time.perf_counter()
        try:
            weights = held(client(), model, before)
        except StaleLayout as error:
            if known and original.load_format == "dummy" != self._original.load_format:
                raise
            _log.warning("the weights stay in this process's own memory: %s", error)
            return model
        checkpoint = known or publish(directory, model, weights)
        lent = client().fill(checkpoint.layout, checkpoint.parts)
        filled = time.perf_counter()
        region = client().attach(lent.id, lent.capability)
        adopt(region, weights)
        _directories.append(directory)
        del weights
        gc.collect()
        torch.cuda.empty_cache()
        _log.info(
            "%d MiB of weights are lent by gpumem (%s): made as %s in %.2f s, published and filled in %.2f s, attached in %.2f s",
            checkpoint.layout.size >> 20, directory, original.load_format,
            loaded - begin, filled - loaded, time.perf_counter() - filled,
        )  # fmt: skip
        return model


def _name(vllm_config: Any, model_config: Any, original: Any) -> str:
    """The same for processes that would end up with the same weights."""
    cache, hf_config = vllm_config.cache_config, model_config.hf_config
    facts = [
        _EDITION, vllm.__version__, torch.__version__, torch.cuda.get_device_capability(),
        model_config.model, model_config.revision, getattr(hf_config, "_commit_hash", None), hf_config.to_json_string(),
        weight_files(Path(model_config.model)),
        str(model_config.dtype), model_config.quantization, str(cache.cache_dtype),
        original.load_format, original.model_loader_extra_config,
        get_tp_group().rank_in_group, get_tp_group().world_size, get_pp_group().rank_in_group, get_pp_group().world_size,
    ]  # fmt: skip
    return directory_name(model_config.model, facts)


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
