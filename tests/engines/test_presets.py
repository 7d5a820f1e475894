"""What `--engine vllm` and `--engine sglang` say on the command line and in the environment, against every released version."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from restore_agent.engine import presets
from restore_agent.engine.presets import KINDS, Setting, prepare
from tests.engines.options import Option, of_sglang, of_vllm
from tests.engines.releases import Release

SETTING = Setting(port=8000, gpumem=Path("/run/gpumem/gpumem.sock"), checkpoints=Path("/var/lib/zerowake/weights"))
COMMANDS = {"vllm": ["vllm", "serve", "m"], "sglang": ["python", "-m", "sglang.launch_server", "--model-path", "m"]}
# Not in every release: what SGLang's parser takes as the beginning of --tp-size and the like, and names that came later.
NOT_EVERYWHERE = {"--tp", "--pp", "--dp", "--device-memory-utilization"}

LATER_VARIABLES = {"VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC"}  # of what came after 0.23; older releases do not look at them


def added(engine: str) -> dict[str, str | None]:
    """The options that a plain command gets, each with the word that follows."""
    command, _, _ = prepare(engine, COMMANDS[engine], SETTING, {})
    more = command[len(COMMANDS[engine]) :]
    followed = zip(more, [*more[1:], "--"], strict=True)
    return {word: None if following.startswith("--") else following for word, following in followed if word.startswith("--")}


def named(engine: str) -> set[str]:
    """Every option that the preset's source names: those that it adds, looks for and refuses."""
    tree = ast.parse(Path(presets.__file__).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith(f"_{engine}")]
    nodes = [node for function in functions for node in ast.walk(function)]
    words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {word for word in words if word.startswith("-") and " " not in word}


def check(release: Release, options: Callable[[Release], dict[str, Option]]) -> None:
    engine, there = release.project, options(release)
    words = added(engine)
    assert words and words.keys() <= named(engine), "else the preset's source was not understood"
    for name, value in words.items():
        assert name in there, f"{release} has no option {name}"
        assert there[name].takes(value), f"{release}: {name} takes {there[name].type}, and is given {value!r}"
    for name in named(engine):
        assert name in there.keys() | NOT_EVERYWHERE, f"{release} has no option {name}: what it stands for is neither found nor refused"
    for name in named(engine) & there.keys():
        assert there[name].names <= named(engine), f"{release}: {name} has other names, {set(there[name].names)}, that are overlooked"


def test_every_option_is_one_of_vllm_s_and_takes_what_it_is_given(vllm: Release) -> None:
    check(vllm, of_vllm)


def test_every_option_is_one_of_sglang_s_and_takes_what_it_is_given(sglang: Release) -> None:
    check(sglang, of_sglang)


def test_vllm_knows_its_variables(vllm: Release) -> None:
    names = KINDS["vllm"].env([*COMMANDS["vllm"], "--tensor-parallel-size", "2"])
    for name in (name for name in names if name.startswith("VLLM_") and name not in LATER_VARIABLES):
        is_known = f"'{name}'" in ast.unparse(ast.parse(vllm.text("vllm/envs.py")))
        assert is_known, f"{vllm} knows no variable {name}"


def test_sglang_knows_its_variables(sglang: Release) -> None:
    for name in (name for name in KINDS["sglang"].env(COMMANDS["sglang"]) if name.startswith("SGLANG_")):
        is_known = f"{name} = " in ast.unparse(ast.parse(sglang.text("sglang/srt/environ.py")))
        assert is_known, f"{sglang} knows no variable {name}"


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("sglang/srt/managers/scheduler.py", "get_device().sleep_on_idle"),
        ("sglang/srt/entrypoints/http_server.py", "not envs.SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION.get()"),
    ],
)
def test_sglang_does_what_it_is_told(sglang: Release, file: str, wanted: str) -> None:
    obeys = wanted in ast.unparse(ast.parse(sglang.text(file)))
    assert obeys, f"{sglang}: {file} does not ask `{wanted}`"
