"""A vLLM of a few lines, whose files have what the adapter imports and replaces, and nothing else; and others that lack something."""

from __future__ import annotations

from pathlib import Path

VERSION = "0.99.0"
FILES = {
    "vllm/__init__.py": "from .version import __version__",
    "vllm/version.py": f"try:\n    __version__ = '{VERSION}'\nexcept Exception:\n    __version__ = 'dev'",
    "vllm/logger.py": "def init_logger(name: str): ...",
    "vllm/distributed/__init__.py": "from .parallel_state import *",
    "vllm/distributed/parallel_state.py": """
class GroupCoordinator:
    ranks: list[int]
    rank_in_group: int
    world_size: int
    cpu_group: ProcessGroup
    device_communicator: DeviceCommunicatorBase | None
def get_tp_group() -> GroupCoordinator: ...
def get_pp_group() -> GroupCoordinator: ...
""",
    "vllm/config.py": """
class CacheConfig:
    cache_dtype: str = "auto"
    kv_cache_memory_bytes: int | None = None
class LoadConfig:
    load_format: str = "auto"
    model_loader_extra_config: dict = {}
class ModelConfig:
    model: str
    revision: str | None
    dtype: "torch.dtype"
    quantization: str | None
    hf_config: PretrainedConfig
class ParallelConfig:
    tensor_parallel_size: int = 1
    disable_custom_all_reduce: bool = False
class VllmConfig:
    cache_config: CacheConfig
    model_config: ModelConfig
    parallel_config: ParallelConfig
""",
    "vllm/model_executor/model_loader/__init__.py": """
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
def register_model_loader(load_format: str): ...
def get_model_loader(load_config: LoadConfig) -> BaseModelLoader: ...
""",
    "vllm/model_executor/model_loader/base_loader.py": """
from abc import ABC, abstractmethod
from vllm.config import LoadConfig, ModelConfig, VllmConfig
class BaseModelLoader(ABC):
    def __init__(self, load_config: LoadConfig): ...
    @abstractmethod
    def download_model(self, model_config: ModelConfig) -> None: ...
    @abstractmethod
    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None: ...
    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module: ...
""",
    "vllm/v1/kv_cache_interface.py": """
class KVCacheTensor:
    size: int
class KVCacheConfig:
    kv_cache_tensors: list[KVCacheTensor]
""",
    "vllm/v1/worker/worker_base.py": """
from vllm.config import VllmConfig
class WorkerBase:
    def __init__(self, vllm_config: VllmConfig, local_rank: int):
        self.vllm_config = vllm_config
        self.cache_config = vllm_config.cache_config
""",
    "vllm/v1/worker/gpu_worker.py": """
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from .worker_base import WorkerBase
class Worker(WorkerBase):
    def init_device(self) -> None:
        self.model_runner = make_runner()
    def determine_available_memory(self) -> int: ...
    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]: ...
    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None: ...
    def sleep(self, level: int = 1) -> None: ...
    def wake_up(self, tags: list[str] | None = None) -> None: ...
""",
    "vllm/v1/sample/ops/topk_topp_triton.py": "def reset_buffer_cache(): ...",
    "vllm/platforms/interface.py": """
class Platform:
    def get_global_graph_pool(self) -> Any: ...
""",
    "vllm/platforms/cuda.py": """
from .interface import Platform
class NvmlCudaPlatform(Platform): ...
class NonNvmlCudaPlatform(Platform): ...
CudaPlatform = NvmlCudaPlatform if available else NonNvmlCudaPlatform
""",
    "vllm/v1/engine/async_llm.py": """
PauseMode = Literal["abort", "wait"]
class AsyncLLM:
    async def sleep(self, level: int = 1, mode: PauseMode = "abort") -> None: ...
    async def wake_up(self, tags: list[str] | None = None) -> None: ...
    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None): ...
""",
}
for folder in ("v1", "v1/worker", "v1/engine", "platforms", "model_executor"):
    FILES[f"vllm/{folder}/__init__.py"] = ""
# What may change, each as a file, what is in it, and what is there instead; and what is said of it.
CHANGES = {
    "a module has moved": ("vllm/logger.py", None, "", "there is no vllm.logger"),
    "a function is gone": ("vllm/logger.py", "init_logger", "make_logger", "vllm.logger has no init_logger"),
    "a class has another name": (
        "vllm/v1/worker/gpu_worker.py", "class Worker(", "class GpuWorker(", "vllm.v1.worker.gpu_worker has no Worker",
    ),
    "a method has another name": (
        "vllm/platforms/interface.py", "get_global_graph_pool", "graph_pool", "has no get_global_graph_pool, which ours is to replace",
    ),
    "a method is passed more": (
        "vllm/v1/worker/gpu_worker.py", "level: int = 1", "level: int = 1, tags: list[str] | None = None",
        "Worker.sleep: vLLM passes (self, level, tags), and it takes (self, level)",
    ),
    "a method is passed more by name": (
        "vllm/v1/worker/gpu_worker.py", "kv_cache_config: KVCacheConfig)", "kv_cache_config: KVCacheConfig, *, layout: str)",
        "Worker.initialize_from_config: vLLM passes layout by name",
    ),
    "a method has become asynchronous": (
        "vllm/v1/worker/gpu_worker.py", "def wake_up", "async def wake_up", "Worker.wake_up is asynchronous",
    ),
    "a name of ours is taken": (
        "vllm/v1/worker/worker_base.py", "class WorkerBase:", "class WorkerBase:\n    def move(self): ...", "Worker has a move of its own",
    ),
    "more is wanted of a loader": (
        "vllm/model_executor/model_loader/base_loader.py",
        "    def load_model", "    @abstractmethod\n    def verify(self): ...\n    def load_model",
        "BaseModelLoader wants a verify",
    ),
}  # fmt: skip


def changed(name: str) -> dict[str, str]:
    """The files after one of the changes."""
    file, before, after, _ = CHANGES[name]
    if before is None:
        return {path: text for path, text in FILES.items() if path != file}
    assert before in FILES[file]
    return {**FILES, file: FILES[file].replace(before, after)}


def install(folder: Path, files: dict[str, str]) -> None:
    """As pip would have it there."""
    described = {f"vllm-{VERSION}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n"}
    for path, text in {**files, **described}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
