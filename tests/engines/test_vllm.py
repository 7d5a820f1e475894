"""The adapter against every released vLLM: what its own source does with vLLM's, and by hand what no line of it says."""

from __future__ import annotations

import ast
import tomllib
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import pytest

from restore_agent.workload import middleware
from restore_agent.workload.fitting import Class, Definition, Function, Sources, misfits
from restore_agent.workload.vllm.kv_cache import allocations
from restore_agent.workload.vllm.plugin import TOLD, adapter
from restore_agent.workload.vllm.sampler_tables import TABLES
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
LOADING = {
    "vllm/v1/worker/gpu_model_runner.py": "get_model_loader(self.load_config)",
    "vllm/v1/worker/gpu/model_runner.py": "get_model_loader(self.vllm_config.load_config)",
}
PENALTIES = "vllm.v1.worker.gpu.sample.penalties"
V2 = "vllm.v1.worker.gpu.model_runner"
GRAPHS = ("vllm/compilation/cuda_graph.py", "vllm/compilation/breakable_cudagraph.py", "vllm/v1/worker/gpu/cudagraph_utils.py")


@cache
def of(release: Release) -> Sources:
    return Sources(release.read, "vllm")


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


def plain(*texts: str | None) -> str:
    """Source text in one form, whatever its spaces and quotes."""
    return "\n".join(ast.unparse(ast.parse(text)) for text in texts if text is not None)


def says(where: str, text: str, wanted: str) -> None:
    """Fails with the line that comes nearest to what is wanted."""
    lines = {line.strip() for line in text.splitlines()}
    nearest = get_close_matches(wanted, sorted(lines, key=len), n=1, cutoff=0)
    is_there = wanted in text  # apart, or the whole text would be shown
    assert is_there, f"{where} does not say `{wanted}`; next to it comes `{nearest[0] if nearest else ''}`"


def worker() -> dict[str, ast.FunctionDef]:
    """The methods of ours."""
    classes = {node.name: node for node in ast.parse((ADAPTER / "worker.py").read_text()).body if isinstance(node, ast.ClassDef)}
    return {each.name: each for each in classes["Worker"].body if isinstance(each, ast.FunctionDef)}


def test_what_the_engine_itself_looks_at_as_it_starts(vllm: Release) -> None:
    assert misfits(of(vllm), adapter()) == [], vllm


@pytest.mark.parametrize(
    ("file", "some"),
    [
        ("worker.py", {"vllm.config.cache.CacheConfig.kv_cache_memory_bytes", "vllm.v1.worker.gpu_worker.Worker.sleep, replaced"}),
        ("platform.py", {"vllm.platforms.interface.Platform.get_global_graph_pool, replaced"}),
        ("all_reduce.py", {"vllm.distributed.parallel_state.GroupCoordinator.cpu_group"}),
        ("middleware.py", {"vllm.v1.engine.async_llm.AsyncLLM.sleep(level=2, mode='wait')"}),
    ],
)
def test_every_use_of_the_adapter(vllm: Release, file: str, some: set[str]) -> None:
    compared = uses(of(vllm), ADAPTER / file, {"Snapshots._engine": ENGINE_CLIENT})
    assert compared.found == [], vllm
    assert some <= compared.seen, "else the adapter's source was not understood, and nothing was compared"


def test_the_kv_cache_takes_the_memory_that_is_reserved_for_it(vllm: Release) -> None:
    found = made_by(vllm)
    assert found, f"{vllm}: nothing in {FILES} makes a KV cache of torch.int8: _CacheMemory of worker.py would not see it"
    for each in found:
        for call in each.calls:
            form = ast.unparse(call.func), len(call.args), {keyword.arg for keyword in call.keywords}
            assert form == ("torch.zeros", 1, {"dtype", "device"}), f"{vllm}, {each}: _CacheMemory would not know {ast.unparse(call)}"
        tensor = a_class(vllm, "vllm.v1.kv_cache_interface", "KVCacheTensor")
        fields = {node.target.id: node.value is not None for node in tensor.node.body if isinstance(node, ast.AnnAssign)}
        for kind, tensors in caches(fields).items():
            asked = each.run(tensors)
            assert sorted(asked) == sorted(allocations(tensors)), (
                f"{vllm}, {each}, {kind}: it asks for {asked}, and {allocations(tensors)} are reserved"
            )


@pytest.mark.parametrize("runner", RUNNERS)
def test_both_model_runners_make_their_cache_so(vllm: Release, runner: str) -> None:
    names = {each.node.name for each in made_by(vllm)}
    nodes = [node for node in ast.walk(ast.parse(vllm.text(runner))) if isinstance(node, ast.Name | ast.Attribute)]
    used = {node.id if isinstance(node, ast.Name) else node.attr for node in nodes}
    assert names & used, f"{vllm}: {runner} calls none of {names}"


def test_the_cache_is_made_within_what_the_worker_replaces(vllm: Release) -> None:
    made = ast.unparse(method(vllm, "vllm.v1.worker.gpu_worker", "Worker", "initialize_from_config"))
    says(f"{vllm}: gpu_worker.Worker.initialize_from_config", made, "self.model_runner.initialize_kv_cache(")


def test_a_state_space_s_state_lies_in_the_kv_cache(vllm: Release) -> None:
    """Its pages are asked for like those of attention, and so are the ones that are reserved."""
    spec = a_class(vllm, "vllm.v1.kv_cache_interface", "MambaSpec")
    assert any(each.node.name == "KVCacheSpec" for each in spec.lineage), f"{vllm}: what a state space keeps is no KV cache"
    assert spec.member("page_size_bytes"), f"{vllm}: a state has no pages"


def set_in(body: Function) -> dict[str, ast.expr]:
    """What a method puts into its object."""
    found = {}
    for node in ast.walk(body):
        match node:
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)], value=value):
                found[name] = value
    return found


def test_the_sampler_s_tables_are_those_that_become_scratch(vllm: Release) -> None:
    made = {
        name: value
        for name, value in set_in(method(vllm, PENALTIES, "PenaltiesState", "__init__")).items()
        if isinstance(value, ast.Call) and ast.unparse(value.func).startswith("torch.")
    }
    assert made.keys() == set(TABLES), f"{vllm}: PenaltiesState makes {sorted(made)} on the GPU"
    for name, call in made.items():
        form = ast.unparse(call.func), len(call.args), {each.arg: ast.unparse(each.value) for each in call.keywords}
        assert form == ("torch.zeros", 2, {"dtype": "torch.int32", "device": "self.device"}), f"{vllm}: {name} is {ast.unparse(call)}"


def test_the_tables_are_found_where_they_are_looked_for(vllm: Release) -> None:
    sampler = set_in(method(vllm, "vllm.v1.worker.gpu.sample.sampler", "Sampler", "__init__"))
    assert ast.unparse(sampler["penalties_state"]).startswith("PenaltiesState("), f"{vllm}: {ast.unparse(sampler['penalties_state'])}"
    before = [set_in(method(vllm, V2, "GPUModelRunner", name)) for name in ("__init__", "load_model")]
    assert any("sampler" in each for each in before), f"{vllm}: the sampler is made after the model is loaded"


def test_a_row_is_cleared_as_a_request_takes_it(vllm: Release) -> None:
    """So nothing of the tables has to outlive a sleep."""
    counting = of(vllm).find(PENALTIES, "bincount")
    assert isinstance(counting, Definition) and counting.node
    for name in TABLES:
        says(f"{vllm}: {PENALTIES}.bincount", ast.unparse(counting.node), f"{name}.index_fill_(0, ")


@pytest.mark.parametrize("file", [f"{V2.replace('.', '/')}.py", "vllm/v1/worker/gpu/sample/sampler.py"])
def test_nobody_else_keeps_a_table(vllm: Release, file: str) -> None:
    """It would be the one that was there before."""
    assigned = [node for node in ast.walk(ast.parse(vllm.text(file))) if isinstance(node, ast.Assign)]
    to_objects = [ast.unparse(node) for node in assigned if isinstance(node.targets[0], ast.Attribute)]
    kept = [text for text in to_objects if any(name in text for name in TABLES)]
    assert kept == [], f"{vllm}: {file} keeps {kept}"


def test_where_the_cache_s_size_is_given_nothing_is_measured(vllm: Release) -> None:
    """Measuring captures graphs and throws them away, and scratch is not given back."""
    body = method(vllm, "vllm.v1.worker.gpu_worker", "Worker", "determine_available_memory").body
    given = [node for node in body if isinstance(node, ast.If) and "self.cache_config.kv_cache_memory_bytes" in ast.unparse(node.test)]
    assert given and isinstance(given[0].body[-1], ast.Return), f"{vllm}: determine_available_memory does not end where the size is given"
    captures = [node for node in body[: body.index(given[0]) + 1] if "profile_cudagraph_memory" in ast.unparse(node)]
    assert not captures, f"{vllm}: determine_available_memory captures graphs though the size is given"


def test_a_layer_says_what_its_longest_request_takes(vllm: Release) -> None:
    asked = method(vllm, "vllm.v1.kv_cache_interface", "KVCacheSpec", "max_memory_usage_bytes")
    assert [each.arg for each in asked.args.args] == ["self", "vllm_config"], vllm


@pytest.mark.parametrize("name", ["sleep", "wake_up"])
def test_the_worker_is_told_to_sleep_and_to_wake_up_by_what_it_takes(vllm: Release, name: str) -> None:
    executor = method(vllm, "vllm.v1.executor.abstract", "Executor", name)
    calls = [node for node in ast.walk(executor) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.collective_rpc"]
    assert len(calls) == 1, f"{vllm}: Executor.{name} tells the workers {[ast.unparse(call) for call in calls]}, and not one thing"
    passed = {each.arg for keyword in calls[0].keywords if isinstance(keyword.value, ast.Call) for each in keyword.value.keywords}
    assert ast.unparse(calls[0].args[0]) == repr(name) and passed, f"{vllm}: Executor.{name} tells the workers {ast.unparse(calls[0])}"
    taken = {each.arg for each in worker()[name].args.args}
    assert passed <= taken, f"{vllm}: Executor.{name} passes {passed}, and our Worker.{name} takes {taken}"
    core = ast.unparse(method(vllm, "vllm.v1.engine.core", "EngineCore", name))
    says(f"{vllm}: EngineCore.{name}", core, f"model_executor.{name}(")
    for way in (ast.unparse(executor), core, ast.unparse(method(vllm, *ENGINE_CLIENT, name))):
        refuses = "enable_sleep_mode" in way
        assert not refuses, f"{vllm}: {name} asks for sleep mode, which our engines are not started with"


def test_falling_asleep_forgets_what_the_cache_held(vllm: Release) -> None:
    sleeping = ast.unparse(method(vllm, "vllm.v1.engine.core", "EngineCore", "sleep"))
    says(f"{vllm}: EngineCore.sleep", sleeping, "clear_prefix_cache = level >= 1")
    says(f"{vllm}: EngineCore.sleep", sleeping, "self.pause_scheduler(mode=mode, clear_cache=clear_prefix_cache)")


def test_the_platform_is_found_by_our_entry_point(vllm: Release) -> None:
    group = of(vllm).find("vllm.plugins", "PLATFORM_PLUGINS_GROUP")
    assert isinstance(group, Definition) and isinstance(group.node, ast.Constant), f"{vllm}: vllm.plugins names no group of platforms"
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert group.node.value in entry_points, f"{vllm} looks for platforms in {group.node.value}, and we are in {list(entry_points)}"


def test_the_plugin_can_end_an_engine_that_it_does_not_fit(vllm: Release) -> None:
    resolving = of(vllm).find("vllm.platforms", "resolve_current_platform_cls_qualname")
    assert isinstance(resolving, Definition) and resolving.node, f"{vllm}: platforms are looked for by another function"
    caught = {ast.unparse(node.type or ast.Name("all")) for node in ast.walk(resolving.node) if isinstance(node, ast.ExceptHandler)}
    assert caught <= {"Exception"}, f"{vllm} catches {caught} of a plugin's, SystemExit too"


@pytest.mark.parametrize("file", GRAPHS)
def test_graphs_are_captured_in_the_platform_s_pool(vllm: Release, file: str) -> None:
    says(f"{vllm}: {file}", plain(vllm.text(file)), "current_platform.get_global_graph_pool()")


def test_the_worker_is_made_of_the_class_that_is_named(vllm: Release) -> None:
    file = "vllm/v1/worker/worker_base.py"
    says(f"{vllm}: {file}", plain(vllm.text(file)), "resolve_obj_by_qualname(parallel_config.worker_cls)")


@pytest.mark.parametrize("file", LOADING)
def test_both_model_runners_load_by_the_registered_format(vllm: Release, file: str) -> None:
    says(f"{vllm}: {file}", plain(vllm.text(file)), LOADING[file])


@pytest.mark.parametrize(
    "wanted", ["for middleware in args.middleware:", "app.add_middleware(imported)", "state.engine_client = engine_client"]
)
def test_the_api_server_has_our_middleware_and_an_engine_client(vllm: Release, wanted: str) -> None:
    says(f"{vllm}: the API server, in {', '.join(SERVERS)},", plain(*(vllm.read(file) for file in SERVERS)), wanted)


def test_the_api_server_is_the_one_in_python(vllm: Release) -> None:
    says(f"{vllm}: vllm/envs.py", plain(vllm.text("vllm/envs.py")), "VLLM_USE_RUST_FRONTEND: bool = False")


def test_what_the_warm_up_asks_is_served(vllm: Release) -> None:
    routes = [file for file in vllm.files if file.startswith("vllm/entrypoints/") and file.endswith(("api_router.py", "health.py"))]
    served = plain(*(vllm.text(file) for file in sorted(routes)))
    says(f"{vllm}: the API server", served, f"router.get('{middleware.HEALTH}'")
    for path in sorted({path for path, _ in middleware.WARM_UP}):
        says(f"{vllm}: the API server", served, f"router.post('{path}'")


def test_what_the_middleware_tells_the_worker_the_worker_does() -> None:
    calls = (node for node in ast.walk(ast.parse((ADAPTER / "middleware.py").read_text())) if isinstance(node, ast.Call))
    told = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "collective_rpc" and isinstance(call.args[0], ast.Constant)
    }
    assert told == TOLD <= worker().keys()
