"""What is installed: the command line put together from the rooms, and the wheel with what is made at build time."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


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


def test_the_wheel_carries_what_is_made_at_build(tmp_path: Path) -> None:
    built = subprocess.run(
        [Path(sys.executable).with_name("uv"), "build", "--wheel", "--quiet", "--out-dir", tmp_path, ROOT],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert not wheel.name.endswith("none-any.whl"), "it holds programs for one platform"
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info for info in archive.infolist()}
    for proto in (ROOT / "proto").glob("*.proto"):
        assert {f"zerowake_proto/{proto.stem}{end}" for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")} <= files.keys()
    assert "zerowake_native/libpage_fill.so" in files
    assert files["zerowake_native/sandbox-init"].external_attr >> 16 & 0o111, "it cannot be run"
    assert {"scaler/programs/cli.py", "restore_agent/drivers/criu.py", "gpumem/__init__.py"} <= files.keys()
    assert not list(ROOT.glob("[!.]*/**/*_pb2.py")), "generated code lies in the source tree"
