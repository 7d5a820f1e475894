"""Where files stand: each with behaviour has a test file of its name, and the drawing in tests/README.md is the tree that is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"scaler": "scaler", "restore_agent": "restore_agent", "gpumem": "gpumem", "proto/zerowake_shared": "shared"}
TOP = ("scaler", "restore_agent", "gpumem", "proto", "deploy", "tests")

EXCEPTIONS = {
    # Seen only from outside, in what the whole does.
    "scaler/kubernetes/engine_pod.py": "scaler/test_engine_pods.py",
    "scaler/plan/displaced.py": "scaler/test_ahead.py",
    "scaler/kubernetes/snapshot_writer.py": "scaler/test_controller.py",
    "scaler/kubernetes/pod_patch.py": "scaler/test_webhook.py",
    "scaler/kubernetes/scaled_object.py": "scaler/test_declarations.py",
    "scaler/local/replica_maker.py": "scaler/test_day.py",
    "scaler/view/activations.py": "scaler/test_activation.py",
    "gpumem/client/ranges.py": "gpumem/test_client.py",
    "restore_agent/drivers/criu.py": "restore_agent/test_restore.py",
    "restore_agent/places/laid_out_changes.py": "restore_agent/test_overlay.py",
    "restore_agent/kubernetes/injection.py": "restore_agent/test_nri.py",
    "restore_agent/kubernetes/pod_captures.py": "restore_agent/test_pods.py",
    "restore_agent/kubernetes/pod_replicas.py": "restore_agent/test_pods.py",
    "restore_agent/programs/connection.py": "restore_agent/test_commands.py",
    "restore_agent/programs/on_kubernetes.py": "restore_agent/test_pods.py",
    "restore_agent/sequences/capture.py": "restore_agent/test_node.py",
    "restore_agent/sequences/dumped.py": "restore_agent/test_node.py",
    "restore_agent/service/metrics.py": "restore_agent/test_service.py",
    # Needs a cluster, or is a program of few lines.
    "scaler/kubernetes/uninstall.py": "e2e/test_resources.py",
    "scaler/programs/cli.py": "test_packaging.py",
    "scaler/programs/entry.py": "test_packaging.py",
    "gpumem/programs/entry.py": "test_packaging.py",
    "proto/zerowake_shared/server_extra.py": "test_packaging.py",
    # Needs a GPU, its driver, or vLLM: there every page and every answer is compared.
    "restore_agent/workload/vllm/all_reduce.py": "bench/gpu/ranks.py",
    "restore_agent/workload/vllm/platform.py": "bench/gpu/vllm.py",
    "restore_agent/workload/vllm/worker.py": "bench/gpu/vllm.py",
    "gpumem/hardware/cuda.py": "gpu/test_memory.py",
}


def product() -> list[str]:
    return [str(path.relative_to(ROOT)) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if path.name != "__init__.py"]


def behaves(file: str) -> bool:
    """Whether anything in it is done on a condition, again and again, or in spite of errors. Declarations and wiring are not."""
    kinds = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.Match, ast.comprehension)
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return any(isinstance(inner, kinds) for function in functions for inner in ast.walk(function))


def of_its_name(file: str) -> bool:
    room = next(room for room in ROOMS if file.startswith(f"{room}/"))
    return any((ROOT / "tests" / folder / f"test_{Path(file).name}").exists() for folder in (ROOMS[room], "gpu"))


@pytest.mark.parametrize("file", product())
def test_a_file_with_behaviour_has_a_test_of_its_name(file: str) -> None:
    if file in EXCEPTIONS:
        assert (ROOT / "tests" / EXCEPTIONS[file]).exists(), "what tests it instead is there"
        assert not of_its_name(file), "it has a test of its own by now, and is no exception"
    else:
        assert of_its_name(file) or not behaves(file)


def test_exceptions_are_of_files_that_there_are() -> None:
    assert EXCEPTIONS.keys() <= set(product())


def drawn() -> set[str]:
    """The folders of the drawing: `room/` at the margin, what is in it below, several on a line where they share one."""
    block = re.search(r"## The rooms\n.*?```\n(.*?)```", (ROOT / "tests/README.md").read_text(), re.DOTALL)
    assert block
    found, room = set(), ""
    for line in block[1].splitlines():
        names = re.match(r" *((?:\w+/ +|\w+/$)*)", line)
        assert names
        for name in re.findall(r"(\w+)/", names[1]):
            room, path = (name, name) if not line.startswith(" ") else (room, f"{room}/{name}")
            found.add(path)
    return found


def test_the_drawing_is_the_tree() -> None:
    there = {str(path.relative_to(ROOT)) for top in TOP for path in (ROOT / top, *(ROOT / top).iterdir()) if path.is_dir()}
    assert drawn() == {path for path in there if not path.endswith("__pycache__")}


@pytest.mark.parametrize("path", sorted((ROOT / "tests/worlds").glob("*.py")), ids=lambda path: path.stem)
def test_a_world_is_read_at_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_no_test_file_imports_another() -> None:
    wrong = re.compile(r"^from tests\.(\w+\.)*(test_\w+|conftest) import", re.MULTILINE)
    assert [str(path) for path in (ROOT / "tests").rglob("*.py") if wrong.search(path.read_text())] == []
