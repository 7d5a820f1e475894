"""Engines that zerowake knows: what `zerowake snapshot create --engine NAME` adds to a command, so that one line is enough.

Any engine works without: one that speaks the control directory is told when to sleep, another is taken when it is idle, and its weights
then travel in the image. What stands here is what an engine has to be told beside that. A variable of the caller's wins over one from here.

    vllm      weights, KV cache and graphs on gpumem's memory; its API server speaks the control directory (workload/vllm/middleware.py);
              its ranks, where it has several, talk in a way that comes through a dump (workload/vllm/collectives.py)
    sglang    the same, where zerowake is installed beside it and gpumem runs (workload/sglang/plugin.py); else its weights and KV cache
              travel in the image, and it is taken when it is idle
    llama-cpp llama-server, or llama-cpp-python's: no adapter; the GGUF is mapped, stays a file, and is shared by all replicas
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from restore_agent.engine.shell_command import ShellCommand, UnclearCommand, script_of
from restore_agent.errors import AgentError, ErrorKind
from restore_agent.workload.sglang.plugin import SGLANG_WEIGHTS
from restore_agent.workload.vllm import collectives
from restore_agent.workload.vllm.plugin import VLLM_ADAPTER

CACHE_TOKENS = 16384  # the same for SGLang, which counts it in tokens: 2.4 GB for Qwen3-8B
_SERVERS = {"vllm.entrypoints.openai.api_server": "vllm", "sglang.launch_server": "sglang"}  # what `vllm serve` and the like are
_MENTIONED = re.compile(rf"\b(vllm|sglang)\s+serve\b|\b({'|'.join(map(re.escape, _SERVERS))})\b")
_WITHOUT_SHELL = "give the engine's command as a list of words, without a shell; in a pod $(NAME) in it is a variable"
_OUTSIDE = 0.02  # of the GPU: what vLLM wants to find free beside gpumem's pool
# A snapshot is dumped and restored by task and by mapping: fewer threads and one malloc arena are less of both. A sandbox has no network
# but its own loopback, so that nothing is to be looked for outside of it; a pod has.
_SMALL = {
    "MALLOC_ARENA_MAX": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
}
# Of eight hardware queues each takes CUDA 6 ms to make anew when a process wakes (H200, driver 580); one GPU's process needs one.
_ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_LLAMA_CPP_PYTHON = "llama_cpp.server"  # llama-cpp-python's own server, as a module of Python
_OWN = "it makes the weights memory of each replica's own, which goes into the image; leave it out, and all replicas share the mapped GGUF"
_PINNED = "it pins the GGUF, so that each restore reads and maps all of it first; leave it out: mapped, it is in the page cache, and shared"
_YES, _NO = ("1", "on", "enabled", "true", "yes"), ("0", "off", "disabled", "false", "no")
_Unshared = tuple[str, str, tuple[str, ...], str]
# Option, the variable that says the same, the values that are meant (none: any), and what is wrong with it.
_NOT_SHARED: tuple[_Unshared, ...] = (
    ("--no-mmap", "LLAMA_ARG_NO_MMAP", (), _OWN),
    ("", "LLAMA_ARG_MMAP", _NO, _OWN),
    ("--direct-io", "", (), _OWN),
    ("-dio", "", (), _OWN),
    ("", "LLAMA_ARG_DIO", _YES, _OWN),
    ("--load-mode", "LLAMA_ARG_LOAD_MODE", ("none", "dio"), _OWN),
    ("-lm", "", ("none", "dio"), _OWN),
    ("--mlock", "", (), _PINNED),
    ("", "LLAMA_ARG_MLOCK", _YES, _PINNED),
    ("--load-mode", "LLAMA_ARG_LOAD_MODE", ("mlock", "mmap+mlock"), _PINNED),
    ("-lm", "", ("mlock", "mmap+mlock"), _PINNED),
)
_NOT_SHARED_PYTHON: tuple[_Unshared, ...] = (("--use-mmap", "USE_MMAP", _NO, _OWN), ("--use-mlock", "USE_MLOCK", _YES, _PINNED))
# With their other names.
_THREADS = (("--threads", "-t"), ("--threads-batch", "-tb"))
_THREADS_PYTHON = (("--n_threads", "--n-threads"), ("--n_threads_batch", "--n-threads-batch"))


class UnsuitableCommand(AgentError):
    """An engine's command has an option that cannot be snapshotted, or contradicts what is added."""

    kind = ErrorKind.INVALID
    reason = "invalid"


@dataclass(frozen=True)
class Setting:
    """Where an engine is to run."""

    port: int
    gpumem: Path  # its socket
    checkpoints: Path  # where weights are kept as engines map them
    has_network: bool = False  # beyond its own loopback
    cpus: int = 0  # that the engine may run on, where they are fewer than the machine's; 0: it may run on all
    env: Mapping[str, str] = field(default_factory=dict)  # what the engine will have


@dataclass(frozen=True)
class Kind:
    """What one engine has to be told."""

    options: Callable[[Sequence[str], Setting], list[str]]  # the whole command, with what is added
    env: Callable[[Sequence[str]], Mapping[str, str]]  # by the command
    passed_on: tuple[str, ...]  # beginnings of variables that it takes from the caller
    checkpoints: str = ""  # the variable that names where weights are kept
    health: Callable[[Sequence[str]], str] = lambda _: "/health"  # its path, by the command


def _vllm(command: Sequence[str], setting: Setting) -> list[str]:
    rest, said = _without(command, "--load-format", "--model-loader-extra-config")
    _one_of(rest, "a snapshot holds one API server", "--api-server-count", "-asc")
    others = ("--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp", "--data-parallel-size-local", "-dpl", "--nnodes", "-n")
    contexts = ("--decode-context-parallel-size", "-dcp", "--prefill-context-parallel-size", "-pcp")
    _one_of(rest, "a snapshot's ranks are tensor parallel alone", *others, *contexts)
    for word in rest:
        if any(_same(word.partition("=")[0], option) for option in ("--enable-expert-parallel", "-ep")):
            raise UnsuitableCommand(f"{word}: a snapshot's ranks are tensor parallel alone, experts too")
    if _vllm_ranks(rest) > 1 and _value(rest, "--distributed-executor-backend") not in (None, "mp"):
        raise UnsuitableCommand("--distributed-executor-backend: a snapshot's ranks are processes of one machine, which `mp` makes")
    if _value(rest, "--worker-cls") not in (None, "auto"):
        raise UnsuitableCommand(f"--worker-cls {_value(rest, '--worker-cls')}: the worker that lends its memory from gpumem is another")
    try:
        extra = json.loads(said.get("--model-loader-extra-config", "{}"))
    except ValueError as error:
        raise UnsuitableCommand(f"--model-loader-extra-config is no JSON: {error}") from None
    extra |= {"checkpoints": str(setting.checkpoints), "load_format": said.get("--load-format", "auto")}
    rest, _ = _without(rest, "--worker-cls")
    rest += [
        "--worker-cls",
        "restore_agent.workload.vllm.worker.Worker",
        "--middleware",
        "restore_agent.workload.vllm.middleware.Snapshots",
    ]
    rest += ["--load-format", "gpumem", "--model-loader-extra-config", json.dumps(extra, sort_keys=True)]
    defaults = {"--port": str(setting.port)}
    if _value(rest, "--device-memory-utilization") is None:  # the same option's other name, from vLLM 0.31 on
        defaults["--gpu-memory-utilization"] = str(_OUTSIDE)
    return _with(rest, defaults)


def _sglang(command: Sequence[str], setting: Setting) -> list[str]:
    parallel = ("--tensor-parallel-size", "--tp-size", "--tp", "--pipeline-parallel-size", "--pp-size", "--pp")
    _one_of(command, "a snapshot of SGLang holds one GPU's process", *parallel, "--data-parallel-size", "--dp-size", "--dp", "--nnodes")
    _one_of(command, "a snapshot holds one API server", "--tokenizer-worker-num")
    defaults = {"--port": str(setting.port)}
    if _value(command, "--mem-fraction-static") is None:  # else its KV cache takes what is left of the GPU
        defaults["--max-total-tokens"] = str(CACHE_TOKENS)
    # Its scheduler polls without a pause otherwise: it would never be idle, and idle is when an engine without an adapter is taken.
    idle = [] if _value(command, "--sleep-on-idle") is not None else ["--sleep-on-idle"]
    return _with([*command, *idle], defaults)


def _vllm_env(command: Sequence[str]) -> dict[str, str]:
    env = {**_ONE_QUEUE, "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", VLLM_ADAPTER: "1"}
    return {**_SMALL, **env, **(collectives.ENVIRONMENT if _vllm_ranks(command) > 1 else {})}


def _sglang_env(command: Sequence[str]) -> dict[str, str]:
    # Its health path asks the model for a token and waits a whole second for it; a restored replica would wait as long.
    return {**_SMALL, **_ONE_QUEUE, "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}


def _llama_cpp(command: Sequence[str], setting: Setting) -> list[str]:
    python = _LLAMA_CPP_PYTHON in command
    for option, variable, values, why in _NOT_SHARED_PYTHON if python else _NOT_SHARED:
        for called, said in ((option, _value(command, option) if option else None), (variable, setting.env.get(variable))):
            if said is not None and (not values or said.lower() in values):
                raise UnsuitableCommand(f"{called}{f' {said}' if values else ''}: {why}")
    defaults = {"--port": str(setting.port)}
    for option, *others in _THREADS_PYTHON if python else _THREADS:
        said = next((value for name in (option, *others) if (value := _value(command, name)) is not None), None)
        most = setting.cpus or os.cpu_count() or 1
        if said is not None and said.isdecimal() and int(said) > most:
            raise UnsuitableCommand(
                f"{option} {said}: the engine has {most} processors here, and llama.cpp's threads wait for each other without a pause: "
                "leave it out, or say fewer"
            )
        if said is None and setting.cpus:  # by itself it counts the machine's
            defaults[option] = str(setting.cpus)
    return _with(list(command), defaults)


def _llama_cpp_env(_: Sequence[str]) -> dict[str, str]:
    return {
        "MALLOC_ARENA_MAX": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, in llama-cpp-python
        # Repacked weights are faster to multiply many tokens by, and memory of each replica's own. `--repack` takes it back.
        "LLAMA_ARG_NO_REPACK": "1",
        "LLAMA_ARG_OFFLINE": "1",
        "USE_MLOCK": "false",  # llama-cpp-python pins unless it is told not to
        "INTERRUPT_REQUESTS": "false",  # nor does one request end another's stream
    }


def _llama_cpp_health(command: Sequence[str]) -> str:
    # Its list of models waits for the model, and whoever waits for the model ends the stream that is under way.
    return "/openapi.json" if _LLAMA_CPP_PYTHON in command else f"{_value(command, '--api-prefix') or ''}/health"


KINDS: dict[str, Kind] = {
    "vllm": Kind(
        _vllm,
        _vllm_env,
        ("CUDA_", "HF_", "TORCH", "TRITON_", "VLLM_"),
    ),
    "sglang": Kind(
        _sglang,
        _sglang_env,
        ("CUDA_", "HF_", "TORCH", "TRITON_", "TVM_FFI_", "SGLANG_"),
        checkpoints=SGLANG_WEIGHTS,
    ),
    "llama-cpp": Kind(
        _llama_cpp,
        _llama_cpp_env,
        ("CUDA_", "GGML_", "HF_", "LLAMA_", "OMP_", "USE_MLOCK", "USE_MMAP"),
        health=_llama_cpp_health,
    ),
}


def prepare(name: str, command: Sequence[str], setting: Setting, caller: Mapping[str, str]) -> tuple[list[str], dict[str, str], str]:
    """The command, the environment to add and the health path. `caller`: the environment that the user is in.

    Raises:
        UnsuitableCommand: no such engine, or it cannot be snapshotted as it is asked for; of a shell's script, also where it is not clear
            how it is asked for.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise UnsuitableCommand(f"no engine {name!r} is known; there are {', '.join(sorted(KINDS))}, and any engine works without --engine")
    passed_on = {key: value for key, value in caller.items() if key.startswith(kind.passed_on)}
    try:
        shell = ShellCommand.read(command)
    except UnclearCommand as error:
        raise UnsuitableCommand(f"{error}: {_WITHOUT_SHELL}") from None
    words = shell.words if shell else command
    where = {kind.checkpoints: str(setting.checkpoints)} if kind.checkpoints else {}
    env = {**kind.env(words), **({} if setting.has_network else _OFFLINE), "GPUMEM_SOCKET": str(setting.gpumem), **where, **passed_on}
    prepared = kind.options(words, dataclasses.replace(setting, env=env))
    if name == "vllm" and _vllm_ranks(words) > 1 and (wrong := collectives.unlike(env)):
        raise UnsuitableCommand(f"{wrong} has to be in the environment of several ranks, and yours says {env[wrong.partition('=')[0]]}")
    return shell.saying(prepared) if shell else prepared, env, kind.health(words)


def fewer_cpus() -> int:
    """How many processors an engine may run on that is started from here; 0: all of the machine's."""
    mine = len(os.sched_getaffinity(0))
    return mine if mine < (os.cpu_count() or 1) else 0


def adapted(command: Sequence[str]) -> str:
    """Which engine with an adapter a container's command starts, as its image and people write it; empty: none that is known."""
    try:
        shell = ShellCommand.read(command)
    except UnclearCommand:
        return ""
    said = shell.words if shell else command
    words = [word.rpartition("/")[2] for word in said]
    serving = [program for program, word in itertools.pairwise(words) if word == "serve" and program in KINDS]
    return next(iter([*serving, *(_SERVERS[word] for word in said if word in _SERVERS)]), "")


def unadapted(command: Sequence[str]) -> str:
    """Why a command that seems to start an engine with an adapter cannot be given it, and what to do; empty: there is no such thing."""
    if adapted(command) or not _MENTIONED.search(script_of(command)):
        return ""
    try:
        ShellCommand.read(command)
        why = "its script is not seen to start it"
    except UnclearCommand as error:
        why = str(error)
    return f"{why}: {_WITHOUT_SHELL}"


def _vllm_ranks(command: Sequence[str]) -> int:
    """How many GPUs vLLM is to divide the model between. Raises UnsuitableCommand."""
    said = [value for option in ("--tensor-parallel-size", "-tp") if (value := _value(command, option)) is not None]
    try:
        return int(said[-1]) if said else 1
    except ValueError:
        raise UnsuitableCommand(f"--tensor-parallel-size {said[-1]}: that is no number of GPUs") from None


def _one_of(command: Sequence[str], why: str, *options: str) -> None:
    for option in options:
        if _value(command, option) not in (None, "1"):
            raise UnsuitableCommand(f"{option} {_value(command, option)}: {why}")


def _value(command: Sequence[str], option: str) -> str | None:
    """What the command says of an option; both spellings, and underscores for dashes, as Python's engines take them."""
    found = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if _same(name, option):
            found = value if equals else following
    return found


def _without(command: Sequence[str], *options: str) -> tuple[list[str], dict[str, str]]:
    """The command without these options and their values, and what they said."""
    rest: list[str] = []
    words = iter(command)
    for word in words:
        name, equals, _ = word.partition("=")
        if not any(_same(name, option) for option in options):
            rest.append(word)
        elif not equals:
            next(words, None)
    said = {option: value for option in options if (value := _value(command, option)) is not None}
    return rest, said


def _with(command: list[str], defaults: Mapping[str, str]) -> list[str]:
    """The command, with the options that it does not name."""
    for option, value in defaults.items():
        if (said := _value(command, option)) is None:
            command = [*command, option, value]
        elif option == "--port" and said != value:
            raise UnsuitableCommand(f"the command listens on port {said}, and --port says {value}")
    return command


def _same(word: str, option: str) -> bool:
    return word == option or (word.startswith("--") and word.replace("_", "-") == option)
