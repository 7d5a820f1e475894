"""How a GPU benchmark begins and ends, on a machine without one: its command, its budget, what is kept of it, and that nothing stays."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.figures import Figure
from tests.bench.gpu import results, sizes
from tests.bench.gpu.run import Run, begun, control
from tests.bench.gpu.sizes import GIB, Room
from tests.worlds.model_shapes import shape_named


class NoGpu:
    """In a GPU's place: `more` bytes of it are in use since the last look."""

    def __init__(self, more: int = 0) -> None:
        self._used, self._more = 0, more

    def used(self) -> int:
        self._used += self._more
        return self._used

    def total(self) -> int:
        return 80 * GIB

    def described(self) -> dict[str, Any]:
        return {"gpus": ["NVIDIA T0"]}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="zw-") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, logs and work where the test can look."""
    for name in ("results", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("tests.bench.gpu.run.refusal", lambda *_: "")  # an engine is larger than this machine may be
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("ZEROWAKE_GPU_WORK", str(short_folder))


def kept(folder: Path) -> dict[str, float]:
    run = json.loads((folder / "trial-t0-small.json").read_text())
    assert run["model"] == shape_named("small").config
    return {figure["name"]: figure["value"] for figure in run["figures"]}


def a_run(until: float) -> Run:
    return Run("python -m tests.bench.gpu.trial small", NoGpu(), Path(), shape_named("small"), Path(), [], [], until)


async def work(run: Run) -> None:
    run.add(Figure("seconds", 0.5, "s"))


async def fault() -> None:
    raise RuntimeError("told to fail")


async def test_a_part_that_may_take_too_long_is_not_begun(tmp_path: Path) -> None:
    run = a_run(until=asyncio.get_running_loop().time() + 10)
    assert not await run.step("long", lambda: work(run), 60)
    assert run.figures == [] and not run.failed
    assert await run.step("short", lambda: work(run), 1)
    assert kept(tmp_path / "results") == kept(tmp_path / "out") == {"seconds": 0.5}


async def test_a_part_that_fails_is_a_figure_and_the_others_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(until=asyncio.get_running_loop().time() + 60)
    assert await run.step("one", lambda: work(run), 1)
    assert not await run.step("other", fault, 1)
    assert run.failed and kept(tmp_path / "out") == {"seconds": 0.5, "other: failed": 1}
    assert "told to fail" in capsys.readouterr().out


def begin(*words: str, gpus: NoGpu | None = None) -> Any:
    return begun("trial", seconds=60, room=lambda _: Room(1, 1), words=words, gpus=gpus or NoGpu())


async def test_what_does_not_fit_is_refused_before_anything_is_made(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.gpu.run.refusal", sizes.refusal)
    monkeypatch.setattr(NoGpu, "total", lambda self: GIB)
    with pytest.raises(SystemExit, match=r"small: its snapshot takes \d+ GiB of a GPU that has 1"):
        async with begin("small"):
            pass
    assert list(short_folder.iterdir()) == []


async def test_a_run_works_within_a_pool_and_leaves_nothing(tmp_path: Path, short_folder: Path) -> None:
    async with begin("small", "--seconds", "30", "--max-num-seqs", "4") as run:
        assert (run.model / "tokenizer.json").exists() and run.options == ["--max-num-seqs", "4"]
        assert run.until <= asyncio.get_running_loop().time() + 30
        (device,) = (await control(lambda gpumem: gpumem.status())).devices
        assert device.wanted_bytes == 1 << 30
        (run.folder / "agent.log").write_text("its words")
        run.add(Figure("seconds", 0.5, "s"))
    assert list(short_folder.iterdir()) == [] and "GPUMEM_SOCKET" not in os.environ
    assert kept(tmp_path / "out") == {"seconds": 0.5, "GPU memory left over": 0}
    assert (tmp_path / "out/agent.log").read_text() == "its words"


async def test_a_kept_folder_has_the_weights_for_the_next_command(short_folder: Path) -> None:
    stamps = []
    for _ in range(2):
        async with begin("small", "--work", str(short_folder / "kept")) as run:
            stamps.append((run.model / "config.json").stat().st_mtime_ns)
    assert stamps[0] == stamps[1]


async def test_a_failed_part_is_the_exit_status_and_memory_that_stays_is_a_miss(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        async with begin("small", gpus=NoGpu(more=200_000_000)) as run:
            await run.step("other", fault, 1)
    assert ended.value.code == 1
    assert kept(tmp_path / "results") == {"other: failed": 1, "GPU memory left over": 200}


async def test_a_model_that_there_is_not_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        async with begin("qwen9-8b"):
            pass
    assert "qwen3-8b" in capsys.readouterr().err


async def test_without_a_gpu_a_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.gpu.run.Cuda.find", lambda: None)
    with pytest.raises(SystemExit, match="needs 2 NVIDIA GPUs"):
        async with begun("trial", seconds=60, room=lambda _: Room(1, 1), words=["small"], count=2):
            pass
