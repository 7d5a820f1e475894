"""What is added to an engine's command: by vLLM's own argument parser's rules, and never against what the user said."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from restore_agent.engine.presets import CACHE_TOKENS, KINDS, Setting, UnsuitableCommand, adapted, prepare, unadapted
from restore_agent.workload.vllm import collectives

SETTING = Setting(port=8123, gpumem=Path("/run/gpumem/gpumem.sock"), checkpoints=Path("/var/lib/zerowake/weights"))


def options(command: list[str]) -> dict[str, str]:
    """The options of a prepared command, each once."""
    found: dict[str, str] = {}
    words = iter(command)
    for word in words:
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            assert name not in found, f"{name} twice in {command}"
            found[name] = value if equals else next(words)
    return found


def test_one_line_is_enough_for_vllm() -> None:
    command, env, health = prepare("vllm", ["vllm", "serve", "Qwen/Qwen3-8B"], SETTING, {})
    assert command[:3] == ["vllm", "serve", "Qwen/Qwen3-8B"]
    said = options(command)
    assert json.loads(said.pop("--model-loader-extra-config")) == {"checkpoints": "/var/lib/zerowake/weights", "load_format": "auto"}
    assert said == {
        "--worker-cls": "restore_agent.workload.vllm.worker.Worker",
        "--middleware": "restore_agent.workload.vllm.middleware.Snapshots",
        "--load-format": "gpumem",
        "--port": "8123",
        "--gpu-memory-utilization": "0.02",
    }
    assert env["GPUMEM_SOCKET"] == "/run/gpumem/gpumem.sock" and env["VLLM_HOST_IP"] == "127.0.0.1"
    assert health == "/health"


@pytest.mark.parametrize("spelling", [["--load-format", "dummy"], ["--load-format=dummy"], ["--load_format", "dummy"]])
def test_the_load_format_is_kept_for_the_first_load(spelling: list[str]) -> None:
    given = ["vllm", "serve", "m", *spelling, "--model-loader-extra-config", '{"concurrency": 4}', "--max-model-len", "8192"]
    said = options(prepare("vllm", given, SETTING, {})[0])
    assert said["--load-format"] == "gpumem" and said["--max-model-len"] == "8192"
    extra = json.loads(said["--model-loader-extra-config"])
    assert extra == {"checkpoints": "/var/lib/zerowake/weights", "concurrency": 4, "load_format": "dummy"}


def test_what_the_user_says_of_memory_and_port_is_kept() -> None:
    given = ["vllm", "serve", "m", "--kv-cache-memory-bytes=8G", "--gpu_memory_utilization", "0.1", "--port", "8123"]
    said = options(prepare("vllm", given, SETTING, {})[0])
    assert said["--kv-cache-memory-bytes"] == "8G" and said["--gpu_memory_utilization"] == "0.1" and said["--port"] == "8123"
    assert "--gpu-memory-utilization" not in said


def test_an_option_is_known_by_its_other_name() -> None:
    said = options(prepare("vllm", ["vllm", "serve", "m", "--device-memory-utilization", "0.1"], SETTING, {})[0])
    assert said["--device-memory-utilization"] == "0.1" and "--gpu-memory-utilization" not in said


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--port", "9000"], "port 9000"),
        (["--pipeline-parallel-size", "2"], "tensor parallel alone"),
        (["-tp", "2", "-dp=2"], "tensor parallel alone"),
        (["--data_parallel_size_local", "2"], "tensor parallel alone"),
        (["-tp", "2", "--enable-expert-parallel"], "tensor parallel alone"),
        (["-dcp", "2"], "tensor parallel alone"),
        (["-tp", "2", "--distributed-executor-backend", "ray"], "processes of one machine"),
        (["-tp", "two"], "no number of GPUs"),
        (["--api-server-count=4"], "one API server"),
        (["-asc", "4"], "one API server"),
        (["--worker-cls", "mine.Worker"], "mine.Worker"),
        (["--model-loader-extra-config", "{"], "no JSON"),
    ],
)
def test_what_cannot_be_snapshotted_is_refused(given: list[str], why: str) -> None:
    with pytest.raises(UnsuitableCommand, match=why):
        prepare("vllm", ["vllm", "serve", "m", *given], SETTING, {})


def test_one_of_anything_is_no_contradiction() -> None:
    prepare("vllm", ["vllm", "serve", "m", "-tp", "1", "--api-server-count", "1", "--worker-cls", "auto"], SETTING, {})


@pytest.mark.parametrize("given", [["--tensor-parallel-size", "2"], ["--tensor_parallel_size=4"], ["-tp", "2"], ["-tp=4"]])
def test_several_ranks_talk_in_a_way_that_comes_through_a_dump(given: list[str]) -> None:
    command, env, _ = prepare("vllm", ["vllm", "serve", "m", *given], SETTING, {})
    assert command[3 : 3 + len(given)] == given
    assert collectives.ENVIRONMENT.items() <= env.items()
    assert collectives.ENVIRONMENT.keys().isdisjoint(prepare("vllm", ["vllm", "serve", "m", "-tp", "1"], SETTING, {})[1])


def test_a_caller_who_wants_ranks_to_talk_otherwise_is_told_that_it_cannot_be() -> None:
    caller = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "1"}
    with pytest.raises(UnsuitableCommand, match=r"VLLM_ALLREDUCE_USE_SYMM_MEM=0 has to be in the environment .* yours says 1"):
        prepare("vllm", ["vllm", "serve", "m", "-tp", "2"], SETTING, caller)
    prepare("vllm", ["vllm", "serve", "m"], SETTING, caller)


def test_variables_of_the_caller_win() -> None:
    caller = {"VLLM_HOST_IP": "10.0.0.1", "HF_HOME": "/models", "SECRET": "x", "CUDA_VISIBLE_DEVICES": "1"}
    env = prepare("vllm", ["vllm", "serve", "m"], SETTING, caller)[1]
    assert env["VLLM_HOST_IP"] == "10.0.0.1" and env["HF_HOME"] == "/models" and env["CUDA_VISIBLE_DEVICES"] == "1"
    assert "SECRET" not in env


SGLANG = ["python", "-m", "sglang.launch_server", "--model-path", "m"]


def test_sglang_is_made_to_rest_to_take_little_memory_and_to_be_healthy_at_once() -> None:
    command, env, health = prepare("sglang", SGLANG, SETTING, {})
    assert command == [*SGLANG, "--sleep-on-idle", "--port", "8123", "--max-total-tokens", str(CACHE_TOKENS)]
    assert env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false" and health == "/health"
    # Nothing of its command needs the adapter, which is turned on by variables where it is there.
    assert env["ZEROWAKE_SGLANG_WEIGHTS"] == "/var/lib/zerowake/weights" and env["GPUMEM_SOCKET"] == "/run/gpumem/gpumem.sock"


@pytest.mark.parametrize("memory", [["--max-total-tokens", "4096"], ["--mem_fraction_static=0.2"]])
def test_what_the_user_says_of_sglang_s_memory_is_kept(memory: list[str]) -> None:
    given = [*SGLANG, *memory, "--sleep-on-idle"]
    assert prepare("sglang", given, SETTING, {})[0] == [*given, "--port", "8123"]


@pytest.mark.parametrize("given", [["--tp", "2"], ["--tp-size=2"], ["--dp_size", "4"], ["--nnodes", "2"]])
def test_sglang_on_several_gpus_is_refused(given: list[str]) -> None:
    with pytest.raises(UnsuitableCommand, match="one GPU"):
        prepare("sglang", [*SGLANG, *given], SETTING, {})


def test_several_api_servers_of_sglang_are_refused() -> None:
    with pytest.raises(UnsuitableCommand, match="one API server"):
        prepare("sglang", [*SGLANG, "--tokenizer-worker-num", "2"], SETTING, {})


LLAMA = ["llama-server", "--model", "/models/m.gguf"]
LLAMA_PYTHON = ["python", "-m", "llama_cpp.server", "--model", "/models/m.gguf"]


def test_one_line_is_enough_for_llama_server_whose_weights_stay_in_their_file() -> None:
    command, env, health = prepare("llama-cpp", LLAMA, SETTING, {"LLAMA_ARG_CTX_SIZE": "4096", "OMP_NUM_THREADS": "2", "SECRET": "x"})
    assert command == [*LLAMA, "--port", "8123"] and health == "/health"
    assert env["LLAMA_ARG_NO_REPACK"] == "1", "repacked weights are memory of each replica's own"
    assert env["LLAMA_ARG_CTX_SIZE"] == "4096" and env["OMP_NUM_THREADS"] == "2" and "SECRET" not in env
    assert prepare("llama-cpp", [*LLAMA, "--api-prefix", "/llm"], SETTING, {})[2] == "/llm/health"


def test_llama_cpp_python_is_told_not_to_pin_and_no_probe_nor_request_ends_a_stream_of_it() -> None:
    command, env, health = prepare("llama-cpp", LLAMA_PYTHON, SETTING, {})
    assert command == [*LLAMA_PYTHON, "--port", "8123"] and health == "/openapi.json"
    assert (env["USE_MLOCK"], env["INTERRUPT_REQUESTS"]) == ("false", "false") and "OMP_NUM_THREADS" not in env


@pytest.mark.parametrize(
    ("given", "env", "why"),
    [
        (["--no-mmap"], {}, r"^--no-mmap: it makes the weights memory of each replica's own"),
        (["-dio"], {}, r"^-dio: it makes"),
        (["--direct-io"], {}, r"^--direct-io: it makes"),
        (["--load-mode", "none"], {}, r"^--load-mode none: it makes"),
        (["-lm", "dio"], {}, r"^-lm dio: it makes"),
        (["--load-mode=mmap+mlock"], {}, r"^--load-mode mmap\+mlock: it pins the GGUF"),
        (["--mlock"], {}, r"^--mlock: it pins the GGUF, so that each restore reads"),
        ([], {"LLAMA_ARG_MLOCK": "1"}, r"^LLAMA_ARG_MLOCK 1: it pins"),
        ([], {"LLAMA_ARG_MMAP": "off"}, r"^LLAMA_ARG_MMAP off: it makes"),
        ([], {"LLAMA_ARG_NO_MMAP": "1"}, r"^LLAMA_ARG_NO_MMAP: it makes"),
        ([], {"LLAMA_ARG_LOAD_MODE": "mlock"}, r"^LLAMA_ARG_LOAD_MODE mlock: it pins"),
        (["--threads", "100000"], {}, r"^--threads 100000: the engine has \d+ processors here"),
        (["-tb", "100000"], {}, r"^--threads-batch 100000: "),
        (["--port", "9000"], {}, r"port 9000"),
    ],
)
def test_what_llama_server_could_not_share_or_run_is_refused(given: list[str], env: dict[str, str], why: str) -> None:
    with pytest.raises(UnsuitableCommand, match=why):
        prepare("llama-cpp", [*LLAMA, *given], SETTING, env)


@pytest.mark.parametrize(
    ("given", "env", "why"),
    [
        (["--use_mmap", "False"], {}, r"^--use-mmap False: it makes"),
        (["--use_mlock=true"], {}, r"^--use-mlock true: it pins"),
        ([], {"USE_MLOCK": "1"}, r"^USE_MLOCK 1: it pins"),
        (["--n_threads", "100000"], {}, r"^--n_threads 100000: "),
    ],
)
def test_what_llama_cpp_python_could_not_share_or_run_is_refused(given: list[str], env: dict[str, str], why: str) -> None:
    with pytest.raises(UnsuitableCommand, match=why):
        prepare("llama-cpp", [*LLAMA_PYTHON, *given], SETTING, env)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (LLAMA, ["--threads", "3", "--threads-batch", "3"]),
        (LLAMA_PYTHON, ["--n_threads", "3", "--n_threads_batch", "3"]),
        ([*LLAMA, "-t", "2", "--threads-batch", "1"], []),
    ],
)
def test_llama_cpp_which_counts_the_machine_s_processors_is_told_how_many_are_its_own(command: list[str], more: list[str]) -> None:
    assert prepare("llama-cpp", command, replace(SETTING, cpus=3), {})[0] == [*command, "--port", "8123", *more]
    with pytest.raises(UnsuitableCommand, match=r"has 3 processors"):
        prepare("llama-cpp", [*LLAMA, "-t", "4"], replace(SETTING, cpus=3), {})


def test_what_llama_cpp_is_told_of_mapping_that_changes_nothing_is_kept() -> None:
    given = [*LLAMA, "--mmap", "--load-mode", "mmap", "--repack", "-t", "1", "--port", "8123"]
    assert prepare("llama-cpp", given, SETTING, {"LLAMA_ARG_MMAP": "1", "LLAMA_ARG_MLOCK": "0"})[0] == given


def test_an_unknown_engine_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UnsuitableCommand, match="there are " + ", ".join(sorted(KINDS))):
        prepare("vlm", ["x"], SETTING, {})


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["vllm", "serve", "/models/m", "--port", "8000"], "vllm"),
        (["/usr/bin/python3", "/usr/local/bin/vllm", "serve", "--model=m"], "vllm"),
        (["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"], "vllm"),
        (["vllm", "bench", "serve"], ""),
        (["sh", "-c", "exec vllm serve m"], "vllm"),
        (["/bin/bash", "-lc", "cd /srv && A=1 exec python3 -m vllm.entrypoints.openai.api_server --model m"], "vllm"),
        (["env", "A=1", "vllm", "serve", "m"], "vllm"),
        (["sh", "-c", "vllm serve $MODEL"], ""),  # which words there are only the shell knows
        (["sh", "-c", "echo 'vllm serve m'"], ""),
        (["python", "server.py", "--model", "vllm"], ""),
        (SGLANG, "sglang"),
        (["sglang", "serve", "--model-path", "m"], "sglang"),
        (["python", "-m", "sglang.bench_serving"], ""),
        (["llama-server", "--model", "/m.gguf"], ""),  # which needs no adapter: its pod is captured as it stands
    ],
)
def test_engines_with_an_adapter_are_known_by_their_commands(command: list[str], kind: str) -> None:
    assert adapted(command) == kind


def test_what_is_added_goes_to_the_engine_in_a_shell_s_script() -> None:
    given = ["bash", "-lc", "cd /srv && A='1 2' exec vllm serve 'my model' --load-format dummy"]
    command, _, _ = prepare("vllm", given, SETTING, {})
    plain, _, _ = prepare("vllm", ["exec", "vllm", "serve", "my model", "--load-format", "dummy"], SETTING, {})
    assert command == ["bash", "-lc", f"cd /srv && A='1 2' {shlex.join(plain)}"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_script_that_is_not_clear_is_refused_with_the_way_out(engine: str) -> None:
    with pytest.raises(UnsuitableCommand, match=r"to be looked up \(\$\): give the engine's command as a list of words, without a shell"):
        prepare(engine, ["sh", "-c", "exec serve $MODEL"], SETTING, {})


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["sh", "-c", "exec vllm serve $MODEL"], "looked up ($)"),
        (["sh", "-c", "python -m vllm.entrypoints.openai.api_server --model m | tee log"], "a pipe"),
        (["sh", "-c", "bash -c 'vllm serve m'"], "not seen to start it"),
        (["sh", "-c", "exec vllm serve m"], ""),
        (["vllm", "serve", "m"], ""),
        (["sh", "-c", "exec server $MODEL"], ""),
        (["python", "server.py", "--about", "vllm serve $MODEL"], ""),
    ],
)
def test_why_an_engine_s_adapter_is_not_used_is_said_where_there_is_one(command: list[str], why: str) -> None:
    said = unadapted(command)
    assert why in said and bool(why) is bool(said)


def test_an_engine_in_a_pod_may_look_outside_and_one_in_a_sandbox_is_told_that_it_cannot() -> None:
    in_pod = Setting(8000, Path("/run/gpumem/gpumem.sock"), Path("/tmp/w"), has_network=True)
    assert "HF_HUB_OFFLINE" not in prepare("vllm", ["vllm", "serve", "m"], in_pod, {})[1]
    assert prepare("vllm", ["vllm", "serve", "m"], SETTING, {})[1]["HF_HUB_OFFLINE"] == "1"
