"""The packages that engines import in a stock image: complete in themselves, and there for as long as they are used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from gpumem.checkpoint.safetensors import keep_reading, read_checkpoint
from gpumem.client.control import Control
from restore_agent.kubernetes import engine_packages
from restore_agent.kubernetes.engine_packages import INSIDE, lay_out
from tests.worlds.pool import Pool

# Isolated from this environment's own packages, as an image without any is.
BARE = [str(Path(sys.base_prefix) / f"bin/python{sys.version_info[0]}.{sys.version_info[1]}"), "-S"]


def run(folder: Path, program: str, *arguments: str) -> str:
    env = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
    done = subprocess.run([*BARE, "-c", program, *arguments], capture_output=True, text=True, check=False, env=env, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"weights": numpy.random.default_rng(3).integers(0, 255, 40 << 20, dtype=numpy.uint8)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    laid = lay_out(tmp_path)
    return laid.folder / Path(laid.path).name


def test_all_of_it_is_imported_without_anything_installed_but_what_engines_bring(folder: Path) -> None:
    program = """
import importlib, json, pkgutil, sys
import gpumem, restore_agent
missing = {}
for package in (gpumem, restore_agent):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            missing[found.name] = error.name
print(json.dumps([missing, sorted(sys.modules)]))
"""
    missing, loaded = json.loads(run(folder, program))
    assert (folder / "restore_agent/workload/vllm/all_reduce.cu").is_file(), "which the adapter compiles there"
    assert set(missing.values()) <= {"sglang", "torch", "vllm"}
    assert {"gpumem.client.client", "gpumem.checkpoint.safetensors", "restore_agent.workload.control_directory"} <= set(loaded)
    assert not any(name.startswith(("google", "blake3")) for name in loaded)


@pytest.mark.parametrize("group", ["vllm.platform_plugins", "sglang.srt.plugins"])
def test_engines_find_their_plugins_there(folder: Path, group: str) -> None:
    program = f"""
from importlib.metadata import entry_points
(point,) = entry_points(group="{group}")
print(point.load()())
"""
    assert run(folder, program) == "None\n", "it stays as it is where its command is not the adapter's"


async def test_a_client_of_a_bare_python_speaks_with_gpumem(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    keep_reading(checkpoint, read_checkpoint(checkpoint))
    program = """
import hashlib, sys
from pathlib import Path
from gpumem.checkpoint.safetensors import kept_reading
from gpumem.client import Client
from gpumem.wire.errors import NotFound
with Client(sys.argv[1], label="bare") as client:
    try:
        client.attach(bytes(32))
    except NotFound as error:
        print("fill it first" in str(error))
    read = kept_reading(Path(sys.argv[2]))
    region = client.attach(client.fill(read.layout, read.parts).id)
    scratch = client.scratch(4096)
    before = hashlib.sha256(region.view()).hexdigest()
    client.quiesce()
    client.resume()
    print(before == hashlib.sha256(region.view()).hexdigest(), region.id.hex(), scratch.size)
"""
    async with Pool(tmp_path / "gpumem.sock") as pool:
        said = (run(folder, program, str(pool.socket), str(checkpoint))).split()
        async with Control.connected(pool.socket) as control:
            (region,) = (await control.status()).regions
    assert said == ["True", "True", region.id.hex(), str(2 << 20)]


def test_weights_cannot_be_hashed_without_blake3_and_that_is_said(folder: Path, checkpoint: Path) -> None:
    program = """
import sys
from pathlib import Path
from gpumem.checkpoint.safetensors import read_checkpoint
try:
    read_checkpoint(Path(sys.argv[1]))
except ImportError as error:
    print(error)
"""
    assert "pip install blake3" in run(folder, program, str(checkpoint))


def test_a_version_stays_where_it_was_and_anybody_may_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lay_out(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert lay_out(tmp_path) == first and {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == written
    assert re.fullmatch(rf"{INSIDE}/[0-9a-f]{{16}}", first.path)
    assert all(path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644) for path in [first.folder, *written])
    newer = {**dict(engine_packages._files()), "gpumem/newer.py": b""}
    monkeypatch.setattr(engine_packages, "_files", lambda: iter(newer.items()))
    second = lay_out(tmp_path)
    assert second.folder == first.folder and second.path != first.path
    kept = {path.name for path in first.folder.iterdir()}
    assert kept == {Path(first.path).name, Path(second.path).name}, "an engine may import of the first one late"


@pytest.mark.parametrize("torn", ["empty", "missing"])
def test_a_version_that_a_crash_has_left_torn_is_put_there_anew(tmp_path: Path, torn: str) -> None:
    laid = lay_out(tmp_path)
    file = laid.folder / Path(laid.path).name / "gpumem/client/client.py"
    before = file.read_bytes()
    file.unlink() if torn == "missing" else file.write_bytes(b"")
    assert lay_out(tmp_path) == laid
    assert file.read_bytes() == before
    assert [path.name for path in laid.folder.iterdir()] == [Path(laid.path).name]
