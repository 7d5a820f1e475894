"""What is installed: the command line put together from the rooms, and the wheel with what is made at build time."""

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")
BASE = {"blake3", "protobuf", "typing-extensions", "zerowake"}  # typing-extensions: blake3's, before Python 3.12
# What an engine's image brings itself, by the modules of `workload` that need it.
OF_THE_ENGINE = {
    "restore_agent.workload.context_memory": "torch",
    "restore_agent.workload.lent_memory": "torch",
    "restore_agent.workload.lent_weights": "torch",
    "restore_agent.workload.sglang.middleware": "sglang",
    "restore_agent.workload.sglang.scheduler": "sglang",
    "restore_agent.workload.vllm.all_reduce": "torch",
    "restore_agent.workload.vllm.platform": "vllm",
    "restore_agent.workload.vllm.worker": "torch",
}


def zerowake(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("zerowake"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=60)


def test_every_room_brings_its_commands() -> None:
    shown = zerowake("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for command in ("snapshot", "agent", "up", "status"):
        assert f" {command} " in shown.stdout
    assert zerowake("--version").stdout == "zerowake 0.1.0\n"


def test_a_room_that_cannot_be_loaded_is_named_and_the_rest_works(tmp_path: Path) -> None:
    described = tmp_path / "broken-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[zerowake.commands]\nbroken = not_there.commands:app\n")
    shown = zerowake("--help", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert shown.returncode == 0
    assert "no commands of broken: not_there.commands:app cannot be loaded" in shown.stderr
    assert " status " in shown.stdout


def test_what_serves_is_imported_by_one_thread() -> None:
    """Where a process may start no more, a library that starts some as it is imported ends it before it can say what it lacks."""
    program = """
import sys
from scaler.programs import cli
def serves(app):
    from scaler.programs import serve, up
    import numpy
    print(next(line for line in open("/proc/self/status") if line.startswith("Threads:")).split()[1])
    sys.exit()
cli.collect = serves
cli.main()
"""
    env = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env, timeout=60)
    assert ended.stdout == "1\n"


def test_grpc_keeps_its_hands_off_what_the_agent_starts() -> None:
    """It restarts threads in a child between fork and exec unless it is told not to before it is imported; some such children crashed."""
    program = """
import os, sys
from scaler.programs import cli
assert "grpc" not in sys.modules
cli.collect = lambda app: sys.exit(os.environ["GRPC_ENABLE_FORK_SUPPORT"] != "0")
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_that_the_chart_runs_are_there() -> None:
    templates = (ROOT / "deploy/helm").rglob("*.yaml")
    named = {module for template in templates for module in re.findall(r"python3?,? -m,? ([\w.]+)", template.read_text())}
    assert named and not {module for module in named if find_spec(module) is None}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(UV, "build", "--wheel", "--quiet", "--out-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["locked", "oldest"])
def beside_an_engine(wheel: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A virtual environment with the wheel and its base dependencies, as an engine's image has it. Engines want theirs older, too."""
    folder = tmp_path_factory.mktemp("engine")
    versions = ROOT / "requirements.lock"
    if request.param == "oldest":
        least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        versions = folder / "oldest.txt"
        versions.write_text("\n".join(each.replace(">=", "==") for each in least))
    run(UV, "venv", "--quiet", "--allow-existing", "--python", sys.executable, folder)
    run(UV, "pip", "install", "--quiet", "--python", folder, "--constraint", versions, wheel)
    return folder


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_the_wheel_carries_what_is_made_at_build(wheel: Path) -> None:
    assert wheel.name == f"zerowake-0.1.0-py3-none-linux_{platform.machine()}.whl", (
        "one platform, whose programs it holds, and every Python"
    )
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info for info in archive.infolist()}
    for proto in (ROOT / "proto").glob("*.proto"):
        assert {f"zerowake_proto/{proto.stem}{end}" for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")} <= files.keys()
    assert "zerowake_native/libpage_fill.so" in files
    assert files["zerowake_native/sandbox-init"].external_attr >> 16 & 0o111, "it cannot be run"
    assert {"scaler/programs/cli.py", "restore_agent/workload/vllm/all_reduce.cu", "gpumem/__init__.py"} <= files.keys()
    page = {f"scaler/page/{path.name}" for path in (ROOT / "scaler/page").iterdir() if path.suffix in (".html", ".css", ".js", ".svg")}
    assert "scaler/page/page.html" in page and page <= files.keys()
    assert not list(ROOT.glob("[!.]*/**/*_pb2.py")), "generated code lies in the source tree"


def test_beside_an_engine_no_server_is_installed(beside_an_engine: Path) -> None:
    listed = run(UV, "pip", "list", "--quiet", "--format=json", "--python", beside_an_engine)
    assert {each["name"] for each in json.loads(listed.stdout)} | {"typing-extensions"} == BASE


def test_what_runs_inside_engines_needs_the_base_alone(beside_an_engine: Path) -> None:
    program = """
import importlib, json, pkgutil
import restore_agent.workload
missing = {}
for found in pkgutil.walk_packages(restore_agent.workload.__path__, "restore_agent.workload."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        missing[found.name] = error.name
from gpumem.client import Client, StaleLayout
from gpumem.client.control import Control
from gpumem.checkpoint.safetensors import read_checkpoint
print(json.dumps(missing))
"""
    assert json.loads(run(beside_an_engine / "bin/python", "-c", program).stdout) == OF_THE_ENGINE


def test_an_engine_speaks_the_control_directory_with_the_base_alone(beside_an_engine: Path, tmp_path: Path) -> None:
    program = """
from restore_agent.workload.control_directory import ControlDirectory
control = ControlDirectory.from_environment()
control.name_weights("/weights")
def resumed(moved):
    print(dict(moved), flush=True)
    raise SystemExit
control.take_part(lambda: print("quiet", flush=True), resumed)
"""
    environment = os.environ | {"SNAPSHOT_CONTROL_DIR": str(tmp_path)}
    with subprocess.Popen([beside_an_engine / "bin/python", "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as engine:
        try:
            assert engine.stdout is not None and engine.stdout.readline() == "quiet\n"
            (tmp_path / "gpus.json").write_text('{"GPU-old": "GPU-new"}')
            (tmp_path / "restore-complete").touch()
            assert engine.stdout.readline() == "{'GPU-old': 'GPU-new'}\n" and engine.wait(10) == 0
        finally:
            engine.kill()
    assert json.loads((tmp_path / "weights.json").read_text()) == {"directories": ["/weights"]}
    assert (tmp_path / "ready-for-snapshot").exists()


@pytest.mark.parametrize("program", ["zerowake", "gpumem"])
def test_a_command_beside_an_engine_says_in_one_line_what_to_install(beside_an_engine: Path, program: str) -> None:
    shown = subprocess.run([beside_an_engine / "bin" / program, "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert (shown.returncode, shown.stdout) == (1, "")
    (line,) = shown.stderr.splitlines()
    assert line.startswith(f"{program}: ") and "pip install '.[server]'" in line
