"""An SGLang of a few lines that runs: a server, its scheduler in a process of its own, and what the adapter hooks and calls of them.

It is laid out as pip would have it (`install`), and started as SGLang is: `python -m sglang.launch_server --model-path DIR --port N`. Its
model is one embedding, which is also its head, and what is computed of a prompt is cached by prefix: an answer is right only where the
weights are, and where the books of the cache are cleared with it. tests/engines/ compares its functions with the real ones of that name.

What lies in the files needs torch from the model loader on; the server does not.
"""

from __future__ import annotations

from pathlib import Path

from tests.worlds import sglang_server

VERSION = "0.99.0"
FILES = {
    "sglang/__init__.py": "from sglang.version import __version__",
    "sglang/version.py": f"__version__ = '{VERSION}'",
    "sglang/launch_server.py": """
import argparse
from sglang.srt.entrypoints.http_server import launch_server
from sglang.srt.plugins import load_plugins
if __name__ == "__main__":
    load_plugins()
    from sglang.srt.entrypoints import http_server
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path")
    parser.add_argument("--port", type=int)
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--max-total-tokens", type=int, default=4096)
    http_server.launch_server(parser.parse_known_args()[0])
""",
    "sglang/srt/constants.py": 'GPU_MEMORY_TYPE_KV_CACHE = "kv_cache"\nGPU_MEMORY_TYPE_WEIGHTS = "weights"',
    "sglang/srt/plugins/__init__.py": """
import traceback
from importlib.metadata import entry_points
from sglang.srt.plugins.hook_registry import HookRegistry
_plugins_loaded = False
def load_plugins():
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for point in entry_points(group="sglang.srt.plugins"):
        try:
            point.load()()
        except Exception:
            traceback.print_exc()
    HookRegistry.apply_hooks()
""",
    "sglang/srt/plugins/hook_registry.py": """
import functools, pkgutil, sys
from enum import Enum
class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"
    REPLACE = "replace"
class HookRegistry:
    _hooks = {}
    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
        cls._hooks[target] = hook, hook_type
    @classmethod
    def apply_hooks(cls):
        for target, (hook, kind) in cls._hooks.items():
            owner, _, name = target.rpartition(".")
            owner = pkgutil.resolve_name(owner)
            original = getattr(owner, name)
            wrapped = _wrapped(original, hook, kind)
            is_static = isinstance(owner, type) and isinstance(owner.__dict__[name], staticmethod)
            setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)
            for module in list(sys.modules.values()):
                for each in [key for key, value in list(getattr(module, "__dict__", {}).items()) if value is original]:
                    setattr(module, each, wrapped)
def _wrapped(original, hook, kind):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if kind is HookType.REPLACE:
            return hook(*args, **kwargs)
        if kind is HookType.BEFORE:
            args, kwargs = hook(*args, **kwargs) or (args, kwargs)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed
    return wrapper
""",
    "sglang/srt/utils/torch_memory_saver_adapter.py": """
from abc import ABC
from contextlib import contextmanager
class TorchMemorySaverAdapter(ABC):
    @staticmethod
    def create(enable: bool):
        return _TorchMemorySaverAdapterNoop()
    def check_validity(self, caller_name): ...
    def configure_subprocess(self): ...
    def region(self, tag: str, enable_cpu_backup: bool = False): ...
    def cuda_graph(self, **kwargs): ...
    def disable(self): ...
    def pause(self, tag: str): ...
    def resume(self, tag: str): ...
    @property
    def enabled(self): ...
class _TorchMemorySaverAdapterNoop(TorchMemorySaverAdapter):
    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool = False):
        yield
""",
    "sglang/srt/utils/aio_rwlock.py": """
import asyncio
class RWLock:
    def __init__(self):
        self._cond, self._readers, self._writer_active = asyncio.Condition(), 0, False
    async def acquire_reader(self):
        async with self._cond:
            await self._cond.wait_for(lambda: not self._writer_active)
            self._readers += 1
    async def release_reader(self):
        async with self._cond:
            self._readers -= 1
            self._cond.notify_all()
    async def acquire_writer(self):
        async with self._cond:
            await self._cond.wait_for(lambda: not self._writer_active and not self._readers)
            self._writer_active = True
    async def release_writer(self):
        async with self._cond:
            self._writer_active = False
            self._cond.notify_all()
""",
    "sglang/srt/configs/load_config.py": """
from dataclasses import dataclass, field
from enum import Enum
class LoadFormat(str, Enum):
    AUTO = "auto"
    DUMMY = "dummy"
@dataclass
class LoadConfig:
    load_format: str = LoadFormat.AUTO
    model_loader_extra_config: dict = field(default_factory=dict)
    tp_rank: int = 0
    draft_model_idx: int | None = None
""",
    "sglang/srt/configs/model_config.py": """
class HfConfig:
    def to_json_string(self):
        return "{}"
class ModelConfig:
    def __init__(self, model_path: str, quantization: str | None = None):
        self.model_path = model_path
        self.revision = None
        self.dtype = "float32"
        self.quantization = quantization
        self.is_draft_model = False
        self.hf_config = HfConfig()
""",
    "sglang/srt/configs/device_config.py": """
class DeviceConfig:
    def __init__(self, device: str = "cuda", gpu_id: int = -1):
        self.device = device
""",
    "sglang/srt/model_loader/loader.py": """
from abc import ABC, abstractmethod
from pathlib import Path
import torch
from safetensors.torch import load_file
from torch import nn
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.configs.model_config import ModelConfig
WORDS, WIDTH = 2048, 4096
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("turn", torch.zeros(WIDTH))
class BaseModelLoader(ABC):
    def __init__(self, load_config: LoadConfig):
        self.load_config = load_config
    @abstractmethod
    def download_model(self, model_config: ModelConfig) -> None: ...
    @abstractmethod
    def load_model(self, *, model_config: ModelConfig, device_config: DeviceConfig) -> nn.Module: ...
class DefaultModelLoader(BaseModelLoader):
    def download_model(self, model_config: ModelConfig) -> None: ...
    def load_model(self, *, model_config: ModelConfig, device_config: DeviceConfig) -> nn.Module:
        print("the checkpoint is read", flush=True)
        with torch.device(device_config.device):
            model = Model()
        state = {}
        for file in sorted(Path(model_config.model_path).glob("*.safetensors")):
            state |= load_file(file)
        if "embed" not in state:  # another's model: numbers made of its own
            every = torch.cat([each.float().flatten() for each in state.values()])
            state["embed"] = every.repeat(-(-WORDS * WIDTH // len(every)))[: WORDS * WIDTH].view(WORDS, WIDTH)
            state["turn"] = every[:WIDTH].abs()
        model.embed.weight.data.copy_(state["embed"])
        model.turn.copy_(state["turn"])
        if "extra" in state:
            model.extra = state["extra"].to(device_config.device)
        return model.requires_grad_(False).eval()
class DummyModelLoader(BaseModelLoader):
    def download_model(self, model_config: ModelConfig) -> None: ...
    def load_model(self, *, model_config: ModelConfig, device_config: DeviceConfig) -> nn.Module:
        with torch.device(device_config.device):
            model = Model().requires_grad_(False).eval()
        for each in model.state_dict().values():
            each.uniform_(-1e-3, 1e-3)
        return model
def get_model_loader(load_config: LoadConfig, model_config: ModelConfig | None = None) -> BaseModelLoader:
    return DefaultModelLoader(load_config)
""",
    "sglang/srt/model_executor/graph_shared_output.py": """
class GraphSharedOutput:
    max_rows: int
    _logits_buffers: dict
    @classmethod
    def create_for_model_runner(cls, model_runner): ...
""",
    "sglang/srt/model_executor/runner_utils/pool.py": """
graph_memory_pool = None
def set_global_graph_memory_pool(val) -> None:
    global graph_memory_pool
    graph_memory_pool = val
""",
    "sglang/srt/model_executor/model_runner.py": """
import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.model_loader.loader import WIDTH, get_model_loader
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
class ModelRunner:
    def __init__(self, server_args):
        self.server_args = server_args
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.memory_saver_adapter = TorchMemorySaverAdapter.create(enable=False)
        config, load = ModelConfig(server_args.model_path), LoadConfig()
        self.model = get_model_loader(load, config).load_model(model_config=config, device_config=DeviceConfig(device))
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.cache = torch.zeros((server_args.max_total_tokens, WIDTH), dtype=torch.float32, device=device)
        self.addresses = torch.tensor([self.cache.data_ptr()], device=device)
        self.init_attention_backends()
    def init_attention_backends(self):
        self.prefill_attention_backend_str = self.decode_attention_backend_str = self.server_args.attention_backend
    def forward(self, tokens, cached):
        model = self.model
        for at in range(cached, len(tokens)):
            before = self.cache[at - 1] if at else torch.zeros_like(model.turn)
            self.cache[at] = torch.tanh(model.embed.weight[tokens[at]] + before * model.turn)
        return int((model.head.weight @ self.cache[len(tokens) - 1].roll(1)).argmax())
""",
    "sglang/srt/managers/io_struct.py": """
from dataclasses import dataclass
@dataclass
class FlushCacheReqInput:
    timeout_s: float | None = None
@dataclass
class FlushCacheReqOutput:
    success: bool
    message: str = ""
@dataclass
class ReleaseMemoryOccupationReqInput:
    tags: list[str] | None = None
@dataclass
class ResumeMemoryOccupationReqInput:
    tags: list[str] | None = None
""",
} | sglang_server.FILES
for path in list(FILES):
    for folder in list(Path(path).parents)[:-1]:
        FILES.setdefault(f"{folder}/__init__.py", "")


def install(folder: Path, files: dict[str, str] = FILES) -> None:
    """As pip would have it there."""
    described = {f"sglang-{VERSION}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: sglang\nVersion: {VERSION}\n"}
    for path, text in {**files, **described}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
