"""What a model needs, against what is known of the machines and of vLLM; and that what does not fit is refused, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from restore_agent.workload.vllm.kv_cache import USUAL_BYTES
from tests.bench.gpu.sizes import CONTEXT, GIB, Needs, Room, cache_for, needs, refusal, state_of, tables, together
from tests.bench.gpu.ten import AT_ONCE, CACHE, MODELS
from tests.worlds.model_shapes import SHAPES, shape_named

H100, H200 = 79 * GIB, 139 * GIB


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as the host's memory where the machine has its temporary folder in it."""
    monkeypatch.setattr("tests.bench.gpu.sizes._is_memory", lambda folder: False)


def test_the_sampler_s_tables_of_qwen3_are_what_vllm_was_seen_to_take() -> None:
    assert 4 * 1024 * 151_936 >> 20 == 593 and tables(151_936) >> 20 == 612
    assert needs(shape_named("qwen3-8b"), ["--max-num-seqs=256"]).sampler == tables(151_936) // 4


def test_a_model_of_8b_has_the_room_that_was_measured_with() -> None:
    assert needs(shape_named("qwen3-8b")).room() == Room(reserve=27, arena=18)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_a_cache_for_its_longest_request(name: str) -> None:
    assert 0 < cache_for(shape_named(name)) <= USUAL_BYTES


def test_a_token_of_qwen3_takes_144_kib_of_cache() -> None:
    shape = shape_named("qwen3-8b")
    assert cache_for(shape, 16 * 101) - cache_for(shape, 16 * 100) == 16 * 144 << 10


def test_a_state_space_has_a_state_and_attention_none() -> None:
    assert state_of(shape_named("qwen3-8b")) == 0
    assert state_of(shape_named("falcon-h1-1.5b")) == 2 * (3584 * 3 + 48 * 64 * 256)


@pytest.mark.parametrize(
    ("name", "options", "gpu", "said"),
    [
        ("qwen3-8b", [], H100, ""),
        ("llama-3.1-8b", [], H100, ""),
        ("gpt-oss-120b", [], H100, "takes 136 GiB of a GPU that has 79"),
        ("gpt-oss-120b", [], H200, ""),
        ("llama-3.1-70b-fp8", [], H200, "takes 149 GiB of a GPU that has 139"),
        ("llama-3.1-70b-fp8", ["--tensor-parallel-size", "2"], H100, "takes 81 GiB"),
        ("llama-3.1-70b-fp8", ["--tensor-parallel-size", "2", "--kv-cache-memory-bytes", "2147483648"], H100, ""),
        ("qwen3-8b", ["--max-model-len", "40000"], H200, ""),
        (
            "qwen3-8b",
            ["--max-model-len", "40000", "--kv-cache-memory-bytes", "4294967296"],
            H200,
            "KV cache of 4 GiB has no room for one request: 6 GiB",
        ),
    ],
)
def test_what_fits_and_what_does_not(
    name: str, options: list[str], gpu: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1 << 40}))
    monkeypatch.setattr("os.sysconf", lambda name: 1 << 20)
    answer = refusal(needs(shape_named(name), options), gpu, tmp_path, tmp_path)
    assert said in answer and bool(said) == bool(answer)


def test_ten_models_fit_one_gpu_parked_and_not_all_captured_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 70 * GIB}))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 128 * GIB}.get)
    each = [needs(shape_named(name), CACHE) for name in MODELS]
    wanted = together(each, AT_ONCE)
    assert len(each) == 10 and refusal(wanted, H100, tmp_path, tmp_path) == ""
    assert wanted.pool + 10 * CONTEXT <= wanted.gpu, "when all are parked, and as many as can be awake are"
    assert refusal(together(each, 10), H100, tmp_path, tmp_path) != ""


def test_a_disk_and_a_memory_that_are_too_small_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Needs(weights=60 * GIB, sampler=0, cache=GIB, least=0)
    free = {"free": 100 * GIB}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), free))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 128 * GIB}.get)
    assert f"123 GiB below {tmp_path}, where 100 are free: --models" in refusal(wanted, H200, tmp_path, tmp_path)
    free["free"] = 200 * GIB
    assert refusal(wanted, H200, tmp_path, tmp_path) == ""
    monkeypatch.setattr("tests.bench.gpu.sizes._is_memory", lambda folder: True)
    assert "193 GiB of the host's memory, of 128" in refusal(wanted, H200, tmp_path, tmp_path)


def test_what_a_command_before_has_left_is_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 4 * GIB}))
    monkeypatch.setattr("os.sysconf", lambda name: 1 << 20)
    wanted, models, work = Needs(weights=GIB, sampler=0, cache=GIB, least=0), tmp_path / "models", tmp_path / "work"
    for folder in (models, work):
        folder.mkdir()
    assert "its files take 5 GiB" in refusal(wanted, H100, models, work)
    with (models / "model.safetensors").open("wb") as file:
        file.truncate(GIB)
    assert refusal(wanted, H100, models, work) == ""


def test_a_folder_that_a_replica_does_not_see_is_refused(tmp_path: Path) -> None:
    wanted = Needs(weights=GIB, sampler=0, cache=GIB, least=0)
    assert "/dev/shm is not seen by an engine" in refusal(wanted, H100, Path("/dev/shm"), tmp_path)
