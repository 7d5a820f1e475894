"""Every command of a README or of the runbook is run by something, and what that is stands in RUN.

A command in a block is run by the test, the script or the benchmark that its row names; that is there, and says so itself: it has the
row's words, or reads the whole section by its title. A command that no row has fails with its file and line, and so does a row that has
no command. Commands within a line of text are mentions: each names commands, options, targets, modules and files that there are.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from dataclasses import dataclass
from typing import Any

import pytest
import typer.main

from gpumem.programs.commands import app as gpumem
from scaler.programs import cli, completion
from tests.worlds.readme_commands import PROGRAMS, ROOT, Command, alternatives, blocks, commands, commands_in_text, is_of_commands, pages


@dataclass(frozen=True)
class Row:
    """page, and either a section of it or how commands begin; who runs them, PATH or PATH::TEST; words that stand in that."""

    page: str
    begins: str
    runs: str
    words: tuple[str, ...]
    section: str = ""


def section(page: str, title: str, runs: str) -> Row:
    return Row(page, "", runs, (f"{title}",), title)


GPU = "tests/bench/gpu"
ENGINES = "restore_agent/workload/README.md"
CREATE = "zerowake snapshot create chat"
RUN = (
    Row("README.md", "make demo", "tests/bench/stranger.py", ('"make", "demo"',)),
    Row("README.md", "make test", ".ci/run", ("test",)),
    section("README.md", "Serve your own models on one machine", "tests/demo/test_readme.py::test_every_other_command"),
    section("README.md", "On Kubernetes", "tests/e2e/test_readme.py::test_every_command_of_the_readme"),
    Row("deploy/README.md", "curl -H", "tests/e2e/test_serve.py::test_what_another_gateway_tells_scales_from_zero_and_back", ("push",)),
    Row("deploy/README.md", "zerowake key make --keys", "tests/demo/test_readme.py", ("zerowake key make --keys",)),
    Row("deploy/README.md", "zerowake key make --encryption", "tests/restore_agent/test_keys.py", ('"make", "--encryption"',)),
    Row("deploy/README.md", "kubectl --namespace zerowake create", "tests/e2e/travelling.py", ("--from-literal=", "--from-file")),
    Row("deploy/README.md", "helm upgrade", "tests/e2e/travelling.py", ("agent.keysSecret=zerowake-keys", "agent.stores.secret")),
    Row("deploy/README.md", "helm upgrade zerowake deploy/helm/zerowake --namespace zerowake --reset-then-reuse-values",
        "tests/e2e/test_held.py", ('"upgrade", "zerowake"', '"--reset-then-reuse-values"')),
    Row("deploy/README.md", "helm rollback", "tests/e2e/test_held.py", ('"helm", "rollback"',)),
    Row("deploy/prometheus/README.md", "helm upgrade", "tests/e2e/test_chart.py::test_what_prometheus_operator_is_given",
        ("monitoring.rules=true", "monitoring.podMonitors=true", "monitoring.labels.release", "networkPolicies.metricsFrom")),
    Row("deploy/prometheus/README.md", "helm upgrade", "tests/e2e/test_chart.py::test_what_grafana_is_given", ("monitoring.board=true",)),
    Row("restore_agent/README.md", "zerowake snapshot create web --renew", "tests/real_servers/test_identity.py", ('"--renew"',)),
    Row(ENGINES, "gpumem serve", f"{GPU}/run.py", ('"serve"', '"--reserve"', '"--arena"')),
    Row(ENGINES, "gpumem status", "tests/gpumem/test_commands.py::test_a_checkpoint_is_imported_shown_pinned_and_evicted", ('"status"',)),
    Row(ENGINES, "gpumem import", "tests/gpumem/test_commands.py::test_a_checkpoint_is_imported_shown_pinned_and_evicted", ('"--fill"',)),
    Row(ENGINES, f"{CREATE} --weights", f"{GPU}/resume.py", ('"--weights"', '"create"')),
    Row(ENGINES, f"{CREATE} --engine vllm", f"{GPU}/ranks.py", ("--tensor-parallel-size", "vllm")),
    Row(ENGINES, f"{CREATE} --engine sglang", f"{GPU}/sglang.py", ("sglang.launch_server", "--model-path")),
    Row(ENGINES, f"{CREATE} --engine llama-cpp", "tests/real_servers/test_llama_cpp.py", ('"--engine", "llama-cpp"',)),
    Row("scaler/README.md", "curl -H", "tests/scaler/test_push.py::test_who_may_tell", ("/demand", "Bearer", "ttl_seconds")),
    Row("scaler/README.md", "zerowake simulate pools.yaml", "tests/scaler/test_worked_example.py", ("Size the pools: an example",)),
    Row("scaler/README.md", "zerowake completion bash", "tests/scaler/test_completion.py::test_commands_options_and_values_in_bash", ()),
    Row("scaler/README.md", "zerowake completion zsh", "tests/scaler/test_completion.py::test_commands_options_and_values_in_zsh", ()),
    Row("scaler/README.md", "zerowake completion fish", "tests/scaler/test_completion.py::test_commands_options_and_values_in_fish", ()),
    Row("scaler/README.md", "OTEL_EXPORTER", "tests/scaler/test_tracing.py::test_a_restore_is_one_trace", ("OTEL_EXPORTER_OTLP_ENDPOINT",)),
    Row(f"{GPU}/README.md", "export ZEROWAKE_VLLM_SITE", f"{GPU}/unpack.sh", ("ZEROWAKE_VLLM_SITE",)),
    Row(f"{GPU}/README.md", "make gpu-cluster ", f"{GPU}/pods.py", ("--python",)),
    Row(f"{GPU}/README.md", "make gpu-cluster-pack", "tests/e2e/cluster/pack.py", ("unpack.sh",)),
    Row(f"{GPU}/README.md", "sh FROM/unpack.sh", "tests/e2e/test_pack.py::test_parts_come_in_several_goes", ("unpack.sh",)),
    Row(f"{GPU}/README.md", "sh FROM/enter.sh", f"{GPU}/pods.py", ("--stand-in", "--prepare", "--machine")),
    Row(f"{GPU}/README.md", "setsid sh FROM/enter.sh", f"{GPU}/gpu_cluster.py", ('"tests.e2e.cluster", "up", "1"',)),
    Row(f"{GPU}/README.md", "OUT=/var/tmp/out sh FROM/enter.sh", f"{GPU}/pods.py", ("OUT",)),
)  # fmt: skip
BY_HAND = {
    "mkdir -p /var/tmp/cluster/root/cluster && mount -t tmpfs": "takes 62 GB of memory, for a machine with a slow disk",
    "set -- --machine /machine": "names what the next lines are given",
}


def who_runs(command: Command) -> list[Row]:
    rows = [row for row in RUN if row.page == command.page]
    return [row for row in rows if (row.section and row.section == command.section) or (row.begins and command.text.startswith(row.begins))]


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_is_run_by_something(command: Command) -> None:
    if not command.text.startswith(tuple(BY_HAND)):
        assert who_runs(command), (
            f"{command}\nis run by nothing: run it in a test, and say in RUN of tests/test_readme_commands.py in which"
        )


@pytest.mark.parametrize("row", RUN, ids=lambda row: f"{row.page} {row.section or row.begins}")
def test_what_runs_it_is_there_and_says_so(row: Row) -> None:
    path, _, name = row.runs.partition("::")
    source = (ROOT / path).read_text()
    missing = [word for word in row.words if word not in source]
    assert not missing, f"{path} has nothing of {missing}"
    tests = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert not name or name in {each.name for each in ast.walk(ast.parse(source)) if isinstance(each, tests)}
    assert any(row in who_runs(command) for command in commands()), "no command of that page begins so"


def test_no_exception_is_left_over() -> None:
    assert not [begins for begins in BY_HAND if not any(command.text.startswith(begins) for command in commands())]


def test_no_block_is_left_out() -> None:
    """Drawings and what commands print are named, and none of them begins like a command."""
    for block in (each for page in pages() for each in blocks(page)):
        if block.language == "" and not is_of_commands(block):
            assert block.content.split()[0] not in PROGRAMS, f"{block.page}:{block.line}"


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    app = typer.Typer()
    completion.add_to(app)
    assert not cli.collect(app)
    return {"zerowake": typer.main.get_command(app), "gpumem": typer.main.get_command(gpumem)}


def spoken(command: Command) -> list[str]:
    """The words that are zerowake's or gpumem's own: past `kubectl exec … --`, and before an engine's command."""
    words = command.text.split()
    if words[0] == "kubectl" and "exec" in words and "--" in words:
        words = words[words.index("--") + 1 :]
    return words[: words.index("--")] if "--" in words else words


@pytest.mark.parametrize("command", [*commands(), *commands_in_text()], ids=str)
def test_what_it_names_is_there(command: Command, programs: dict[str, Any]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in alternatives(" ".join(spoken(command))):
        words = text.split()
        match words[0]:
            case "zerowake" | "gpumem":
                wrong = not_known(programs[words[0]], words[1:])
                assert not wrong, f"{command}: {wrong}"
            case "make":
                assert words[1] in targets, command
            case "pip":
                named = re.search(r"\[([\w,]+)\]", text)
                assert not named or set(named[1].split(",")) <= extras.keys(), command
            case "python" if words[1:2] == ["-m"] and words[2].startswith("tests."):
                assert importlib.util.find_spec(words[2]), command
            case "pytest":
                assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), command


def not_known(program: Any, words: list[str]) -> str:
    """What of it is no command and no option, in words; nothing if all is."""
    found = program
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        if words[0] == "…":
            return ""
        if words[0] not in found.commands:
            return f"there is no command {words[0]}"
        found, words = found.commands[words[0]], words[1:]
    options = {option for each in found.params for option in (*each.opts, *each.secondary_opts)} | {"--help", "--version"}
    unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in options]
    return f"there is no option {unknown}" if unknown else ""
