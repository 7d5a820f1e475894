"""The adapter against every released SGLang: what its own source does with SGLang's, and by hand what no line of it says."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

from restore_agent.workload import middleware
from restore_agent.workload.fitting import Definition, Function, Sources, hooked, misfits
from restore_agent.workload.sglang.plugin import adapter
from tests.engines.releases import Release
from tests.engines.uses import uses
from tests.worlds.sglang_sources import FILES

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "restore_agent/workload/sglang"
KNOWN = {"Snapshots._manager": ("sglang.srt.managers.tokenizer_manager", "TokenizerManager")}
RELEASED = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
POOLS = "sglang/srt/mem_cache/memory_pool.py"
GRAPHS = "sglang/srt/model_executor/runner_backend"


@cache
def of(release: Release) -> Sources:
    return Sources(release.read, "sglang")


def function(release: Release, target: str) -> Function:
    found = hooked(of(release), target)
    assert found, f"{release} has no {target}"
    return found[1]


def says(release: Release, target: str, *wanted: str) -> None:
    """Fails where a function does not say something, or says it in another order."""
    text, at = ast.unparse(function(release, target)), 0
    for each in wanted:
        found = text.find(each, at)
        assert found >= 0, f"{release}: {target} does not say `{each}` (after what it has to say before that)"
        at = found + len(each)


def test_what_the_engine_itself_looks_at_as_it_starts(sglang: Release) -> None:
    assert misfits(of(sglang), adapter()) == [], sglang


@pytest.mark.parametrize(
    ("file", "some"),
    [
        (
            "scheduler.py",
            {
                "sglang.srt.utils.torch_memory_saver_adapter.TorchMemorySaverAdapter.region, replaced",
                "sglang.srt.configs.model_config.ModelConfig.quantization",
                "sglang.srt.model_executor.model_runner.ModelRunner.decode_attention_backend_str",
            },
        ),
        (
            "middleware.py",
            {
                "sglang.srt.managers.tokenizer_manager.TokenizerManager.flush_cache(timeout_s=_IDLE_SECONDS)",
                "sglang.srt.utils.aio_rwlock.RWLock.acquire_writer()",
            },
        ),
    ],
)
def test_every_use_of_the_adapter(sglang: Release, file: str, some: set[str]) -> None:
    compared = uses(of(sglang), ADAPTER / file, KNOWN, tuple(hook for hook in adapter().hooks if hook.file == file))
    assert compared.found == [], sglang
    assert some <= compared.seen, "else the adapter's source was not understood, and nothing was compared"


def test_plugins_are_found_by_our_entry_point_and_can_end_an_engine_that_they_do_not_fit(sglang: Release) -> None:
    group = of(sglang).find("sglang.srt.plugins", "GENERAL_PLUGINS_GROUP")
    assert isinstance(group, Definition) and isinstance(group.node, ast.Constant), f"{sglang} names no group of plugins"
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert group.node.value in entry_points, f"{sglang} looks for plugins in {group.node.value}, and we are in {list(entry_points)}"
    loading = function(sglang, "sglang.srt.plugins.load_plugins")
    caught = {ast.unparse(node.type or ast.Name("all")) for node in ast.walk(loading) if isinstance(node, ast.ExceptHandler)}
    assert caught <= {"Exception"}, f"{sglang} catches {caught} of a plugin's, SystemExit too"
    says(sglang, "sglang.srt.plugins.load_plugins", "func()", "HookRegistry.apply_hooks()")


def test_hooks_are_registered_as_ours_are(sglang: Release) -> None:
    kinds = of(sglang).classes(of(sglang).find("sglang.srt.plugins.hook_registry", "HookType"))[0]
    assert {hook.kind for hook in adapter().hooks} <= {
        ast.unparse(node.targets[0]) for node in kinds.node.body if isinstance(node, ast.Assign)
    }
    register = function(sglang, "sglang.srt.plugins.hook_registry.HookRegistry.register").args
    assert [each.arg for each in register.args] == ["cls", "target", "hook", "hook_type"], sglang
    wrap = "sglang.srt.plugins.hook_registry._wrap_fn"
    says(sglang, wrap, "return hook(*args, **kwargs)", "result = hook(*args, **kwargs)", "args, kwargs = result")
    says(sglang, wrap, "modified = hook(result, *args, **kwargs)", "return modified if modified is not None else result")


@pytest.mark.parametrize("file", ["sglang/launch_server.py", "sglang/cli/serve.py"])
def test_plugins_are_asked_before_the_server_is_started(sglang: Release, file: str) -> None:
    text = ast.unparse(ast.parse(sglang.text(file)))
    assert "load_plugins()" in text, f"{sglang}: {file} asks no plugins"


def test_plugins_are_asked_in_the_scheduler_s_process_before_there_is_a_scheduler(sglang: Release) -> None:
    says(sglang, "sglang.srt.managers.scheduler.run_scheduler_process", "load_plugins()", "scheduler = Scheduler(")
    starting = ast.unparse(ast.parse(sglang.text("sglang/srt/entrypoints/engine.py")))
    assert "set_start_method('spawn', force=True)" in starting, f"{sglang} does not spawn its processes"


def test_the_warm_up_is_the_one_that_the_server_is_passed(sglang: Release) -> None:
    server = "sglang.srt.entrypoints.http_server"
    says(sglang, f"{server}.launch_server", "_setup_and_run_http_server(", "execute_warmup_func=execute_warmup_func")
    says(sglang, f"{server}._setup_and_run_http_server", "app.warmup_thread_kwargs = dict(", "execute_warmup_func=execute_warmup_func")
    says(sglang, f"{server}._wait_and_warmup", "execute_warmup_func(server_args)")
    says(sglang, f"{server}.health_generate", "server_status == ServerStatus.Starting", "status_code=503")


def test_who_asks_while_weights_are_changed_waits(sglang: Release) -> None:
    says(
        sglang,
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "async with self.model_update_lock.reader_lock",
        "_send_one_request(",
    )
    for lock, held in (("_ReaderLock", "acquire_reader"), ("_WriterLock", "acquire_writer")):
        says(sglang, f"sglang.srt.utils.aio_rwlock.{lock}.__aenter__", held)


def test_releasing_the_cache_s_memory_pauses_it_and_clears_its_books(sglang: Release) -> None:
    says(sglang, f"{RELEASED}.release_memory_occupation", "memory_saver_adapter.pause(GPU_MEMORY_TYPE_KV_CACHE)", "self.flush_cache()")
    says(sglang, f"{RELEASED}.resume_memory_occupation", "memory_saver_adapter.resume(GPU_MEMORY_TYPE_KV_CACHE)")
    for name in ("release", "resume"):
        method = function(sglang, f"{RELEASED}.{name}_memory_occupation")
        unconditional = [node for node in method.body if "memory_saver_adapter" in ast.unparse(node) and not isinstance(node, ast.If)]
        assert not unconditional, f"{sglang}: {name}_memory_occupation does more than what its tags say"
    cleared = ("self.tree_cache.reset()", "self.req_to_token_pool.clear()", "self.token_to_kv_pool_allocator.clear()")
    says(sglang, "sglang.srt.managers.scheduler.Scheduler.flush_cache", "self.is_fully_idle(", *cleared)


def test_the_memory_saver_is_asked_for_by_what_is_hooked(sglang: Release) -> None:
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    says(sglang, f"{runner}.init_memory_saver_adapter", "self.memory_saver_adapter = TorchMemorySaverAdapter.create(")
    pools = sglang.text(POOLS)
    assert "TorchMemorySaverAdapter.create(" in pools, f"{sglang}: {POOLS} asks for no memory saver"


def test_the_kv_cache_is_made_as_scratch_is_taken_for_it(sglang: Release) -> None:
    found = 0
    for node in ast.walk(ast.parse(sglang.text(POOLS))):
        if isinstance(node, ast.With) and any("GPU_MEMORY_TYPE_KV_CACHE" in ast.unparse(item) for item in node.items):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("torch.zeros", "torch.empty"):
                    found += 1
                    others = {keyword.arg for keyword in call.keywords} - {"size", "dtype", "device"}
                    assert not others, f"{sglang}: {ast.unparse(call)}, which _CacheMemory of scheduler.py would not know"
    assert found > 10, f"{sglang}: {POOLS} makes its caches in another way"
    says(
        sglang,
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers_normal",
        "with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE)",
        "torch.zeros(",
    )
    assert "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING = EnvBool(False)" in sglang.text("sglang/srt/environ.py"), "by default it is"


def test_the_model_is_loaded_by_what_is_hooked(sglang: Release) -> None:
    says(
        sglang,
        "sglang.srt.model_executor.model_runner_components.load_model_utils.load_model_with_memory_saver",
        "loader = get_model_loader(load_config=load_config, model_config=model_config)",
        "loader.load_model(model_config=model_config",
    )


def test_graphs_are_captured_in_the_pool_that_is_set_once_attention_is_there(sglang: Release) -> None:
    says(
        sglang,
        "sglang.srt.model_executor.runner_utils.pool.get_or_create_global_graph_memory_pool",
        "if resources.graph_memory_pool is None",
        "return resources.graph_memory_pool",
    )
    for backend in ("full", "breakable"):
        text = ast.unparse(ast.parse(sglang.text(f"{GRAPHS}/{backend}_cuda_graph_backend.py")))
        assert "self._pool = get_or_create_global_graph_memory_pool(self._device_module)" in text, f"{sglang}: {backend} graphs"
        assert "self._memory_saver_adapter.enabled" in text, f"{sglang}: {backend} graphs are another memory saver's"
    text, at = ast.unparse(ast.parse(sglang.text("sglang/srt/managers/scheduler.py"))), 0
    for wanted in ("self.tp_worker.init_attention_backends()", "self.tp_worker.init_cuda_graphs()"):
        assert (at := text.find(wanted, at)) >= 0, f"{sglang}: the scheduler does not say `{wanted}`, or too early"


def test_what_the_warm_up_asks_is_served(sglang: Release) -> None:
    served = ast.unparse(ast.parse(sglang.text("sglang/srt/entrypoints/http_server.py")))
    assert f"@app.get('{middleware.HEALTH}')" in served, sglang
    for path in sorted({path for path, _ in middleware.WARM_UP}):
        assert f"@app.post('{path}'" in served, f"{sglang} does not serve {path}"


def test_the_sglang_of_the_tests_is_called_as_the_real_one_is(sglang: Release) -> None:
    """What the adapter is run with on the CPU (tests/worlds/sglang_sources.py)."""
    compared = 0
    for hook in adapter().hooks:
        compared += _alike(sglang, hook.target)
    for owner, names in {
        "sglang.srt.managers.tokenizer_manager.TokenizerManager": (
            "flush_cache",
            "generate_request",
            "release_memory_occupation",
            "resume_memory_occupation",
        ),
        "sglang.srt.utils.aio_rwlock.RWLock": ("acquire_reader", "release_reader", "acquire_writer", "release_writer"),
        "sglang.srt.utils.torch_memory_saver_adapter.TorchMemorySaverAdapter": ("region", "pause", "resume", "cuda_graph", "disable"),
        "sglang.srt.model_loader.loader.DummyModelLoader": ("load_model", "download_model"),
        "sglang.srt.plugins.hook_registry.HookRegistry": ("register", "apply_hooks"),
        "sglang.srt.entrypoints.http_server": ("get_global_state", "_wait_and_warmup"),
        "sglang.srt.model_executor.runner_utils.pool": ("set_global_graph_memory_pool",),
    }.items():
        for name in names:
            compared += _alike(sglang, f"{owner}.{name}")
    assert compared > 20


def _alike(release: Release, target: str) -> bool:
    """Whoever can call the function of the tests can call SGLang's: by position up to where ours ends, and by name."""
    here, theirs = hooked(Sources(FILES.get, "sglang"), target), function(release, target)
    assert here, f"the SGLang of the tests has no {target}"
    ours = here[1]
    assert isinstance(ours, ast.AsyncFunctionDef) == isinstance(theirs, ast.AsyncFunctionDef), f"{release}: {target}"
    names = {each.arg for each in (*theirs.args.args, *theirs.args.kwonlyargs)}
    passed = [each.arg for each in (*ours.args.args, *ours.args.kwonlyargs)]
    assert set(passed) <= names, f"{release}: {target} takes {names}, and that of the tests {passed}"
    needed = [each.arg for each in theirs.args.args[: len(theirs.args.args) - len(theirs.args.defaults)]]
    assert set(needed) <= set(passed), f"{release}: {target} wants {needed}, and that of the tests takes {passed}"
    return True
