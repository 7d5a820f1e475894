"""SGLang on lent memory, in its scheduler: weights in a region, KV cache and what its CUDA graphs compute in scratch.

SGLang has a memory saver, whose regions it names by what they are for and whose `pause` and `resume` its API server reaches. Ours is in
its place: within the region of the KV cache every tensor of some size is a piece of scratch, and pausing that region lets go of all that is
lent. What else is made in a region (tables of addresses, what starts as something else than zeros) stays torch's own, with its content.

Weights are published as they are after loading (lent_weights.py). A model that is not quantized is then not loaded again: it is made by
SGLang's loader for dummy weights, which are dropped for views of the region. One whose loading makes more than its parameters is found out
by that, and loaded as always, as quantized ones are. Either takes the room of the weights twice for a moment.

What a CUDA graph reads, its replay has written before, as a rule. Kernels of some attention backends break it: they keep counters and
tables in the graphs' memory from the capture on (SGLang saves that memory for them when it pauses). So graphs compute in scratch only with
backends that are known to keep nothing; with any other their memory travels in the image.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import sglang
import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner_utils.pool import set_global_graph_memory_pool
from sglang.srt.model_loader.loader import BaseModelLoader, DummyModelLoader
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
from torch.overrides import TorchFunctionMode

from gpumem.checkpoint.safetensors import Checkpoint, kept_reading
from gpumem.client import Client, StaleLayout
from gpumem.client.torch import ScratchPool, bytes_at, torch_device
from restore_agent.workload import lent_memory
from restore_agent.workload.control_directory import ControlDirectory
from restore_agent.workload.lent_weights import (
    SMALL,
    Held,
    addresses,
    adopt,
    directory_name,
    fill_buffers,
    fits,
    held,
    publish,
    weight_files,
)
from restore_agent.workload.sglang.plugin import SGLANG_WEIGHTS

KEEP_NOTHING = frozenset({"fa3", "torch_native", "triton"})  # attention backends whose kernels find nothing in a graph's memory
_EDITION = 1  # of what is written: another one is written anew
_NOT_WEIGHTS = ("--port", "--host", "--served-model-name", "--api-key", "--max-total-tokens")  # that say nothing of them
_log = logging.getLogger("sglang.zerowake")  # below SGLang's own, so that it is shown


def client() -> Client:
    """This process's. Raises PeerGone, WrongDevice."""
    return lent_memory.client("sglang")


def memory_saver(enable: bool) -> MemorySaver:
    """In place of `TorchMemorySaverAdapter.create`; one for all, whether SGLang wants to save memory or not."""
    return _memory_saver()


def lending_loader(loader: Any, load_config: Any, model_config: Any = None) -> Loader:
    """After `get_model_loader`, which has chosen `loader`."""
    return Loader(load_config, original=loader)


def graphs_in_scratch(_: None, runner: Any) -> None:
    """After `ModelRunner.init_attention_backends`, and so before any graph is captured; without a GPU none is."""
    if not torch.cuda.is_available():
        return
    _logits_in_scratch(runner)
    backends = {str(runner.prefill_attention_backend_str), str(runner.decode_attention_backend_str)}
    if backends <= KEEP_NOTHING:
        set_global_graph_memory_pool(lent_memory.graph_pool(client()).id)
    else:
        _log.warning("CUDA graphs of attention backend %s keep their memory, which travels in the image", " and ".join(sorted(backends)))


def _logits_in_scratch(runner: Any) -> None:
    """What graphs of all sizes write their logits to, and nobody reads later: 148 MiB for 256 requests of 151,936 words.

    SGLang keeps one for the process, and takes this one where it is of its size.
    """
    shared, words = GraphSharedOutput.create_for_model_runner(runner), runner.model_config.vocab_size
    if shared and words not in shared._logits_buffers:
        size = shared.max_rows * words * torch.float.itemsize
        memory = bytes_at(lent_memory.graph_pool(client()).allocate(size), size, client().device)
        shared._logits_buffers[words] = memory.view(torch.float).view(shared.max_rows, words)


class MemorySaver(TorchMemorySaverAdapter):  # type: ignore[misc, unused-ignore]
    """SGLang's interface of a memory saver, on gpumem's memory. One of its calls does all: that for the KV cache."""

    def __init__(self) -> None:
        self._cache: _CacheMemory | None = None

    def configure_subprocess(self) -> Any:
        return nullcontext()

    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
        if tag != GPU_MEMORY_TYPE_KV_CACHE:
            yield
            return
        self._cache = self._cache or _CacheMemory(client())
        with self._cache:
            yield

    def cuda_graph(self, **kwargs: Any) -> Any:
        raise NotImplementedError("graphs are captured in gpumem's scratch, by SGLang's own way")

    def disable(self) -> Any:
        return nullcontext()

    def pause(self, tag: str) -> None:
        """Lets go of all that is lent. Raises RuntimeError: the KV cache is not."""
        if tag != GPU_MEMORY_TYPE_KV_CACHE:
            return
        if self._cache is None or not self._cache.taken:
            raise RuntimeError(
                f"SGLang {sglang.__version__} makes its KV cache in a way that zerowake's adapter does not know, and it would be in the "
                "image: use one that it fits (restore_agent/README.md names them), or take the snapshot without zerowake beside SGLang"
            )
        before, after = lent_memory.let_go(client())
        gc.freeze()  # what is there now is not looked through again, which took a second each time
        _log.info("torch held %s; asleep %s, and %d MiB of KV cache are gone", before, after, self._cache.taken >> 20)

    def resume(self, tag: str) -> None:
        """All of it, at the same addresses. The KV cache is empty; the scheduler's books of it were cleared when it fell asleep."""
        if tag != GPU_MEMORY_TYPE_KV_CACHE:
            return
        begin = time.perf_counter()
        control = ControlDirectory.from_environment()
        if control:
            control.renew()
        lent_memory.take_back(client(), control.moved() if control else {})
        _log.info("attached again in %.1f ms", (time.perf_counter() - begin) * 1000)

    @property
    def enabled(self) -> bool:
        """What SGLang does otherwise where memory is saved (other graphs, checks) is not wanted."""
        return False


@cache
def _memory_saver() -> MemorySaver:
    return MemorySaver()


class Loader(BaseModelLoader):  # type: ignore[misc, unused-ignore]
    """Maps what another process loaded, or loads it by the loader that SGLang chose for all that follow."""

    def __init__(self, load_config: Any, *, original: Any) -> None:
        super().__init__(load_config)
        self._original = original

    def download_model(self, model_config: Any) -> None:
        self._original.download_model(model_config)

    def load_model(self, *, model_config: Any, device_config: Any) -> Any:
        directory = Path(os.environ[SGLANG_WEIGHTS]) / _name(self.load_config, model_config)
        known = kept_reading(directory)
        before = addresses(client())
        begin = time.perf_counter()
        model = None
        if known and model_config.quantization is None:
            model, weights = _made_empty(self.load_config, model_config, device_config, directory, known, before)
        how = "made without its weights"
        if model is None:
            model = self._original.load_model(model_config=model_config, device_config=device_config)
            how = "loaded"
            try:
                weights = held(client(), model, before)
            except StaleLayout as error:
                _log.warning("the weights stay in this process's own memory: %s", error)
                return model
        loaded = time.perf_counter()
        checkpoint = known or publish(directory, model, weights)
        lent = client().fill(checkpoint.layout, checkpoint.parts)
        filled = time.perf_counter()
        adopt(client().attach(lent.id, lent.capability), weights)
        if control := ControlDirectory.from_environment():
            control.name_weights(directory)
            control.announce()
        del weights
        gc.collect()
        torch.cuda.empty_cache()
        _log.info(
            "%d MiB of weights are lent by gpumem (%s): %s in %.2f s, published and filled in %.2f s, attached in %.2f s",
            checkpoint.layout.size >> 20, directory, how, loaded - begin, filled - loaded, time.perf_counter() - filled,
        )  # fmt: skip
        return model


def _made_empty(
    load_config: Any, model_config: Any, device_config: Any, directory: Path, known: Checkpoint, before: set[int]
) -> tuple[Any, list[Held]]:
    """The model as it is before its weights are read, and their places. No model: its loading makes more than that."""
    dummy = copy(load_config)
    dummy.load_format, dummy.model_loader_extra_config = LoadFormat.DUMMY, {}
    model = DummyModelLoader(dummy).load_model(model_config=model_config, device_config=device_config)
    try:
        fill_buffers(model, directory)
        if fits(known, weights := held(client(), model, before)):
            return model, weights
        del weights
        why = "its tensors are others than those that were published"
    except StaleLayout as error:
        why = str(error)
    _log.warning("the model is loaded as always: %s", why)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return None, []


def _name(load_config: Any, model_config: Any) -> str:
    """The same for processes that would end up with the same weights: what they are told, but for what says nothing of weights."""
    told = iter(sys.argv[1:])
    arguments = [word for word in told if not _says_nothing(word, told)]
    hf_config = model_config.hf_config
    facts: list[object] = [
        _EDITION, sglang.__version__, torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_capability(), arguments,
        model_config.model_path, model_config.revision, getattr(hf_config, "_commit_hash", None), hf_config.to_json_string(),
        weight_files(Path(model_config.model_path)), str(model_config.dtype), model_config.quantization, model_config.is_draft_model,
        str(load_config.load_format), load_config.model_loader_extra_config, load_config.tp_rank, load_config.draft_model_idx,
    ]  # fmt: skip
    return directory_name(model_config.model_path, facts)


def _says_nothing(word: str, following: Iterator[str]) -> bool:
    name, equals, _ = word.partition("=")
    if name.replace("_", "-") not in _NOT_WEIGHTS:
        return False
    if not equals:
        next(following, None)
    return True


class _CacheMemory(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Within it, tensors of zeros and of nothing in particular are pieces of scratch, from a size on. `taken`: bytes."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._memory = ScratchPool(client)
        self._client = client
        self._device = torch_device(client.device)
        self.taken = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in (torch.zeros, torch.empty) or kwargs.keys() - {"size", "dtype", "device"}:
            return function(*args, **kwargs)
        where = torch.device(kwargs.pop("device", None) or torch.get_default_device())
        form = function(*args, **kwargs, device="meta")
        size = form.numel() * form.element_size()
        if where.type != self._device.type or size < SMALL:
            return function(*args, **kwargs, device=where)
        self.taken += size
        return bytes_at(self._memory.allocate(size), size, self._client.device).view(form.dtype).view(form.shape)
