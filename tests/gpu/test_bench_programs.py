"""The GPU benchmarks as they are run, on a machine without a GPU: gpumem lends the host's memory, and a stand-in is in vLLM's place.

All else is the real thing: the command line, the model's files, snapshots, restores, standbys and parked ones, the gateway, the tables. So
a mistake in them is found here, and not on the first of the few minutes that there are on a GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpumem.checkpoint.safetensors import CHUNK
from tests.bench.gpu import disk, parked, ranks, results, run, sglang, ten, vllm
from tests.bench.gpu.run import pool
from tests.bench.gpu.sizes import GIB
from tests.worlds import sglang_sources
from tests.worlds.model_shapes import shape_named
from tests.worlds.needs import missing_for_criu
from tests.worlds.ports import free_port

STAND_IN = ("-m", "tests.worlds.vllm_stand_in")


class NoGpu:
    """In the place of a GPU that nobody uses."""

    def used(self) -> int:
        return 0

    def total(self) -> int:
        return 80 * GIB

    def described(self) -> dict[str, Any]:
        return {"gpus": ["NVIDIA T0"], "driver": "none"}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if missing := missing_for_criu():
        pytest.skip(missing)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "_nvidia", lambda count: NoGpu())
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(vllm.Bench, "program", STAND_IN)
    monkeypatch.setattr(vllm.Bench, "gateway", free_port())
    monkeypatch.setattr(vllm.Bench, "rounds", 1)
    monkeypatch.setattr(run, "refusal", lambda *_: "")  # a real engine is larger than this machine may be
    monkeypatch.setattr(run, "pool", lambda reserve, arena: pool(1, 1))  # of the host, which has less memory than a GPU
    with tempfile.TemporaryDirectory(prefix="zw-") as short:
        monkeypatch.setenv("ZEROWAKE_GPU_WORK", short)
        yield
        assert list(Path(short).iterdir()) == []


def kept(tmp_path: Path, name: str, of: str = "small") -> dict[str, float]:
    """Figures by name; none says that a part has failed."""
    content = json.loads((tmp_path / f"{name}-t0-{of}.json").read_text())
    figures = {figure["name"]: figure["value"] for figure in content["figures"]}
    assert not [each for each in figures if each.endswith(": failed")]
    return figures


async def test_vllm_parked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parked, "ROUNDS", 2)
    monkeypatch.setattr(parked, "WATCHED_SECONDS", 0.1)
    monkeypatch.setattr(sys, "argv", ["parked", "small", "--max-num-seqs", "4"])
    assert await parked.main() == 0
    figures = kept(tmp_path, "parked")
    cases = ("parked, made ahead", "parked, kept when idle", "parked, weights in host memory", "standby, made ahead", "staged")
    assert {f"from zero, {case}" for case in cases} < figures.keys()
    assert figures["parked: host memory, private"] > 0 and figures["plain vLLM's answer is the same"] == 1
    assert figures["pages of the restored processes compared"] > 0
    assert "compared" in (tmp_path / "out/agent.log").read_text()


async def test_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm", "small"])
    assert await vllm.main() == 0
    figures = kept(tmp_path, "vllm")
    cases = ("staged", "standby, made ahead", "standby, kept when idle", "weights in host memory", "weights in host memory, image on disk")
    assert {f"from zero, {case}" for case in cases} < figures.keys()
    assert figures["plain vLLM's answer is the same"] == 1 and "cold start ÷ staged" in figures


async def test_vllm_of_several_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the ranks, which the stand-in does not have."""
    monkeypatch.setattr(ranks, "ROUNDS", 1)
    monkeypatch.setattr(ranks, "TOKENS", 17)
    monkeypatch.setattr(sys, "argv", ["ranks", "small"])
    assert await ranks.main() == 0
    figures = kept(tmp_path, "ranks")
    cases = ("staged", "standby, made ahead", "parked, made ahead", "parked, weights in host memory")
    assert {f"from zero, {case}" for case in cases} < figures.keys()
    assert {f"a token, {how}" for how in ("restored", "plain", "NCCL over the host's memory")} < figures.keys()
    assert figures["token rate of a restored engine ÷ vLLM as it is"] > 0
    assert figures[ranks.OURS] == 0, "the stand-in says nothing of it"


async def test_several_models_parked_and_woken_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two commands, as where the time of one is not enough: the second captures what is missing."""
    monkeypatch.setattr(ten, "ROUNDS", 1)
    with tempfile.TemporaryDirectory(prefix="zw-") as folder:
        for models in ("small", "small,small-llama"):
            monkeypatch.setattr(sys, "argv", ["ten", models, "--work", folder])
            assert await ten.main() == 0
        assert list(Path(folder, "models").iterdir()) == [Path(folder, "models/small")], "of the last plain start"
    figures = kept(tmp_path, "ten", "2")
    slowest = figures["the slowest of 2, median"]
    assert slowest == max(figures["from zero, parked, small"], figures["from zero, parked, small-llama"])
    captured = [name for name in figures if name.startswith("zerowake snapshot create")]
    assert captured == ["zerowake snapshot create --engine vllm, small-llama"]
    assert figures["plain vLLM's answer is the same"] == 1


async def test_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["disk", "small"])
    with tempfile.TemporaryDirectory(prefix="zw-", dir="/var/tmp") as on_a_disk:  # which /tmp is not everywhere
        monkeypatch.setenv("ZEROWAKE_GPU_WORK", on_a_disk)
        assert await disk.main() == 0
    figures = kept(tmp_path, "disk")
    for name in ("weights, disk → GPU", "image, disk → memory"):
        assert figures[name] > 0 and figures[f"{name} ÷ the disk itself"] > 0
    assert figures["weights: read from the disk ÷ their files"] >= 1 and figures["image: read from the disk ÷ its chunks"] >= 1
    chunks = -(-shape_named("small").bytes // CHUNK)
    assert figures["chunks of regions compared with the files"] >= 2 * chunks, "in both rounds all of them"


async def test_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the adapter itself, on an SGLang of a few lines."""
    pytest.importorskip("torch")
    sglang_sources.install(tmp_path / "site")
    monkeypatch.setenv("ZEROWAKE_SGLANG_SITE", str(tmp_path / "site"))
    monkeypatch.setattr(sglang.Bench, "rounds", 1)
    monkeypatch.setattr(sys, "argv", ["sglang", "small", "--attention-backend", "triton"])
    assert await sglang.main() == 0
    figures = kept(tmp_path, "sglang")
    cases = ("staged", "standby, made ahead", "parked, made ahead", "weights in host memory")
    assert {f"from zero, {case}" for case in cases} < figures.keys()
    weights = 2048 * 4096 * 4 / 1e6
    assert figures["weights, lent"] >= weights and "cold start ÷ staged" in figures
    assert figures["plain SGLang's answer is the same"] == 1
