"""The adapter against every released vLLM: what its own source does with vLLM's, and by hand what no line of it says."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

from restore_agent.workload.vllm import middleware
from restore_agent.workload.vllm.fitting import Class, Function, Sources, misfits, told
from restore_agent.workload.vllm.kv_cache import allocations
from tests.engines.allocation import FILES, RUNNERS, Allocator, allocators, caches
from tests.engines.releases import Release
from tests.engines.uses import uses

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "restore_agent/workload/vllm"
ENGINE_CLIENT = ("vllm.v1.engine.async_llm", "AsyncLLM")  # what the API server has as `app.state.engine_client`
# Where the API server takes its middleware and its engine client; they have moved.
SERVERS = (
    "vllm/entrypoints/openai/api_server.py",
    "vllm/entrypoints/serve/middleware/register.py",
    "vllm/entrypoints/launchers/api_server/app_state.py",
)
GRAPHS = ("vllm/compilation/cuda_graph.py", "vllm/v1/worker/gpu/cudagraph_utils.py")


@cache
def of(release: Release) -> Sources:
    return Sources(release.read)


def a_class(release: Release, module: str, name: str) -> Class:
    found = of(release).classes(of(release).find(module, name))
    assert found, f"{release}: {module} has no class {name}"
    return found[0]


def method(release: Release, module: str, owner: str, name: str) -> Function:
    found = a_class(release, module, owner).member(name)
    assert found and isinstance(found[1], Function), f"{release}: {module}.{owner} has no method {name}"
    return found[1]


def made_by(release: Release) -> list[Allocator]:
    texts = {file: release.read(file) for file in FILES}
    return allocators({file: text for file, text in texts.items() if text is not None})


def worker() -> ast.ClassDef:
    (found,) = [
        node for node in ast.parse((ADAPTER / "worker.py").read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Worker"
    ]
    return found


def test_what_the_engine_itself_looks_at_as_it_starts(vllm: Release) -> None:
    assert misfits(of(vllm)) == []


@pytest.mark.parametrize(
    ("file", "some"),
    [
        ("worker.py", {"vllm.config.cache.CacheConfig.kv_cache_memory_bytes", "vllm.v1.worker.gpu_worker.Worker.sleep, replaced"}),
        ("platform.py", {"vllm.platforms.interface.Platform.get_global_graph_pool, replaced"}),
        ("middleware.py", {"vllm.v1.engine.async_llm.AsyncLLM.sleep(level=2, mode='wait')"}),
    ],
)
def test_every_use_of_the_adapter(vllm: Release, file: str, some: set[str]) -> None:
    compared = uses(of(vllm), ADAPTER / file, {"Snapshots._engine": ENGINE_CLIENT})
    assert compared.found == []
    assert some <= compared.seen, "else the adapter's source was not understood, and nothing was compared"


def test_the_kv_cache_takes_the_memory_that_is_reserved_for_it(vllm: Release) -> None:
    found = made_by(vllm)
    assert found, f"nothing in {FILES} makes a KV cache of torch.int8: _CacheMemory of worker.py would not see it"
    for each in found:
        for call in each.calls:
            form = ast.unparse(call.func), len(call.args), {keyword.arg for keyword in call.keywords}
            assert form == ("torch.zeros", 1, {"dtype", "device"}), f"{each}: _CacheMemory would not know {ast.unparse(call)}"
        tensor = a_class(vllm, "vllm.v1.kv_cache_interface", "KVCacheTensor")
        fields = {node.target.id: node.value is not None for node in tensor.node.body if isinstance(node, ast.AnnAssign)}
        assert "size" in fields
        for kind, tensors in caches(fields).items():
            asked = each.run(tensors)
            assert sorted(asked) == sorted(allocations(tensors)), (
                f"{each}, {kind}: it asks for {asked}, and {allocations(tensors)} are reserved"
            )


@pytest.mark.parametrize("runner", RUNNERS)
def test_both_model_runners_make_their_cache_so(vllm: Release, runner: str) -> None:
    names = {each.node.name for each in made_by(vllm)}
    nodes = [node for node in ast.walk(ast.parse(vllm.text(runner))) if isinstance(node, ast.Name | ast.Attribute)]
    used = {node.id if isinstance(node, ast.Name) else node.attr for node in nodes}
    assert names & used, f"{runner} calls none of {names}"


def test_the_cache_is_made_within_what_the_worker_replaces(vllm: Release) -> None:
    made = ast.unparse(method(vllm, "vllm.v1.worker.gpu_worker", "Worker", "initialize_from_config"))
    assert "self.model_runner.initialize_kv_cache(" in made


def test_sleep_and_wake_up_reach_the_worker_by_what_it_takes(vllm: Release) -> None:
    ours = {each.name: each.args for each in worker().body if isinstance(each, ast.FunctionDef)}
    for name in ("sleep", "wake_up"):
        executor = method(vllm, "vllm.v1.executor.abstract", "Executor", name)
        calls = [node for node in ast.walk(executor) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.collective_rpc"]
        assert [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)] == [name]
        (passed,) = [keyword.value for keyword in calls[0].keywords if keyword.arg == "kwargs"]
        assert isinstance(passed, ast.Call)
        assert {keyword.arg for keyword in passed.keywords} <= {each.arg for each in ours[name].args}
        core = ast.unparse(method(vllm, "vllm.v1.engine.core", "EngineCore", name))
        assert f"model_executor.{name}(" in core
        for way in (ast.unparse(executor), core, ast.unparse(method(vllm, *ENGINE_CLIENT, name))):
            assert "enable_sleep_mode" not in way, "it would refuse, since the engine was not started with sleep mode"


def test_falling_asleep_forgets_what_the_cache_held(vllm: Release) -> None:
    sleeping = method(vllm, "vllm.v1.engine.core", "EngineCore", "sleep")
    paused = [node for node in ast.walk(sleeping) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.pause_scheduler"]
    assert len(paused) == 1 and "clear_cache" in {keyword.arg for keyword in paused[0].keywords}


def test_the_platform_is_found_by_our_entry_point(vllm: Release) -> None:
    group = ast.unparse(of(vllm).module("vllm.plugins").names["PLATFORM_PLUGINS_GROUP"])
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert ast.literal_eval(group) in entry_points
    resolving = of(vllm).module("vllm.platforms").names["resolve_current_platform_cls_qualname"]
    assert isinstance(resolving, Function)
    caught = {ast.unparse(node.type) for node in ast.walk(resolving) if isinstance(node, ast.ExceptHandler) and node.type}
    assert caught == {"Exception"}, "the plugin's SystemExit would not end the engine"


@pytest.mark.parametrize("file", GRAPHS)
def test_graphs_are_captured_in_the_platform_s_pool(vllm: Release, file: str) -> None:
    assert "current_platform.get_global_graph_pool()" in ast.unparse(ast.parse(vllm.text(file)))


def test_the_worker_is_made_of_the_class_that_is_named(vllm: Release) -> None:
    assert "resolve_obj_by_qualname(parallel_config.worker_cls)" in ast.unparse(ast.parse(vllm.text("vllm/v1/worker/worker_base.py")))


def test_both_model_runners_load_by_the_registered_format(vllm: Release) -> None:
    for runner in ("vllm/v1/worker/gpu_model_runner.py", "vllm/v1/worker/gpu/model_runner.py"):
        assert "get_model_loader(" in vllm.text(runner), runner


def test_the_api_server_has_our_middleware_and_an_engine_client(vllm: Release) -> None:
    server = "\n".join(ast.unparse(ast.parse(text)) for file in SERVERS if (text := vllm.read(file)) is not None)
    assert "for middleware in args.middleware:" in server, f"none of {SERVERS} takes --middleware"
    assert "app.add_middleware(imported)" in server
    assert "state.engine_client = engine_client" in server


def test_what_the_warm_up_asks_is_served(vllm: Release) -> None:
    routes = [file for file in vllm.files if file.startswith("vllm/entrypoints/") and file.endswith(("api_router.py", "health.py"))]
    served = "\n".join(ast.unparse(ast.parse(vllm.text(file))) for file in sorted(routes))
    assert f"router.get('{middleware._HEALTH}'" in served
    for path in sorted({path for path, _ in middleware._WARM_UP}):
        assert f"router.post('{path}'" in served, path


def test_what_the_middleware_tells_the_worker_the_worker_does() -> None:
    assert told() and told() <= {each.name for each in worker().body if isinstance(each, ast.FunctionDef)}
