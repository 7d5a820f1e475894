"""That a use of the adapter's which a vLLM does not have is found: one of a few lines has all of them, and loses one after the other."""

from pathlib import Path

import pytest

from restore_agent.workload.fitting import Sources
from tests.engines.uses import uses
from tests.worlds.vllm_sources import FILES

ADAPTER = Path(__file__).parents[2] / "restore_agent/workload/vllm"
ENGINE_CLIENT = {"Snapshots._engine": ("vllm.v1.engine.async_llm", "AsyncLLM")}
LOADERS, CLIENT = "vllm/model_executor/model_loader/__init__.py", "vllm/v1/engine/async_llm.py"


def found(file: str, files: dict[str, str]) -> str:
    return "\n".join(uses(Sources(files.get, "vllm"), ADAPTER / file, ENGINE_CLIENT).found)


@pytest.mark.parametrize("file", ["worker.py", "platform.py", "middleware.py", "all_reduce.py"])
def test_what_is_there_is_found_to_be_there(file: str) -> None:
    assert found(file, FILES) == ""


@pytest.mark.parametrize(
    ("file", "theirs", "before", "after", "said"),
    [
        ("worker.py", "vllm/config.py", "kv_cache_memory_bytes", "kv_cache_bytes", "CacheConfig.kv_cache_memory_bytes is not there"),
        # Read in a function of ours that is passed it, set on a copy, and read of what a method is passed.
        ("worker.py", "vllm/config.py", "revision", "commit", "ModelConfig.revision is not there"),
        ("worker.py", "vllm/config.py", "load_format", "format", "LoadConfig.load_format is not there"),
        ("worker.py", "vllm/v1/kv_cache_interface.py", "kv_cache_tensors", "places", "KVCacheConfig.kv_cache_tensors is not there"),
        ("worker.py", "vllm/distributed/parallel_state.py", "rank_in_group", "rank", "GroupCoordinator.rank_in_group is not there"),
        (
            "worker.py",
            LOADERS,
            "load_config: LoadConfig",
            "load_config: LoadConfig, model",
            "get_model_loader(original) takes (load_config",
        ),
        ("worker.py", LOADERS, "register_model_loader(load_format: str)", "register_model_loader()", "(LOAD_FORMAT) takes ()"),
        ("middleware.py", CLIENT, '"wait"', '"keep"', "mode='wait') takes ['abort', 'keep'] as mode"),
        ("middleware.py", CLIENT, "async def wake_up", "def wake_up", "wake_up() is not asynchronous"),
        (
            "middleware.py",
            CLIENT,
            "args: tuple = (), ",
            "",
            "collective_rpc('move', args=(dict(moved), secrets.token_hex(32))) takes (self, method",
        ),
        ("middleware.py", CLIENT, "class AsyncLLM", "class Engine", "vllm.v1.engine.async_llm.AsyncLLM is not there"),
    ],
)
def test_what_is_not_there_is_named(file: str, theirs: str, before: str, after: str, said: str) -> None:
    assert before in FILES[theirs]
    assert said in found(file, FILES | {theirs: FILES[theirs].replace(before, after)})
