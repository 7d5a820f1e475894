"""SGLang's scheduler on lent memory, where torch is installed: an SGLang of a few lines, in its processes, asleep and awake and again.

On the machine's GPU, or else the host's memory. Its answers are those of one without the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from gpumem.hardware.devices import devices  # noqa: E402
from tests.worlds.device import World  # noqa: E402
from tests.worlds.sglang_engine import READ, SGLang  # noqa: E402
from tests.worlds.sglang_sources import FILES  # noqa: E402

# One after the other: each shares a beginning with one before, so that the cache is of use, and wrong where its books outlive it.
PROMPTS = ("one two", "one two three", "one twelve", "four", "one two three")
RUNNER, CACHE = (
    "sglang/srt/model_executor/model_runner.py",
    "torch.zeros((server_args.max_total_tokens, WIDTH), dtype=torch.float32, device=device)",
)
WEIGHTS, KV_CACHE = 2048 * 4096 * 4, 4096 * 4096 * 4  # bytes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"), devices()[0])
    with world.server(pool=768 << 20, arena=128 << 20):
        yield world


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"))


def written(folder: Path, **more: object) -> Path:
    from safetensors.torch import save_file  # noqa: PLC0415

    torch.manual_seed(3)
    save_file({"embed": torch.randn(2048, 4096), "turn": torch.rand(4096), **more}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[str]:
    """Of an SGLang without the adapter."""
    folder = tmp_path_factory.mktemp("plain")
    with SGLang.started(folder, model, None, folder) as engine:
        answers = engine.answers(*PROMPTS)
        assert "SGLang's own warm-up" in engine.said
    assert len(set(answers)) == len(set(PROMPTS))
    return answers


def test_asleep_nothing_is_held_and_awake_the_answers_are_the_same(world: World, model: Path, expected: list[str], tmp_path: Path) -> None:
    with SGLang.started(tmp_path, model, world.socket, tmp_path / "weights") as engine:
        assert engine.status("/health") == 503 and "SGLang's own warm-up" not in engine.said
        (region,) = world.status().regions
        assert region.size >= WEIGHTS and region.leases == 0
        assert world.status().devices[0].scratch_bytes == 0
        (directory,) = (tmp_path / "weights").iterdir()
        assert str(directory) in (engine.control / "weights.json").read_text()
        for _ in range(3):
            engine.wake()
            assert world.status().devices[0].scratch_bytes >= KV_CACHE
            assert engine.answers(*PROMPTS) == expected
            engine.sleep()
            assert world.status().devices[0].scratch_bytes == 0 and world.region(region.id).leases == 0  # type: ignore[union-attr]
            with ThreadPoolExecutor(1) as others:
                early = others.submit(engine.ask, PROMPTS[0])
                engine.wake()
                assert early.result(60) == expected[0], "who asks while it sleeps is answered when it is awake"
            engine.sleep()


def test_a_checkpoint_is_read_once(world: World, model: Path, expected: list[str], tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    for number, options in enumerate(([], ["--max-total-tokens", "2048"], ["--attention-backend", "flashinfer"])):
        with SGLang.started(tmp_path / str(number), model, world.socket, weights, *options) as engine:
            assert (READ in engine.said) == (number != 1), "with options that say nothing of weights it is the same model"
            engine.wake()
            assert engine.answers(*PROMPTS) == expected
    assert len(list(weights.iterdir())) == 2


def test_a_model_whose_loading_makes_more_than_its_parameters_is_loaded_as_always(
    world: World, expected: list[str], tmp_path: Path
) -> None:
    model = written(tmp_path, extra=torch.ones(200, 200))
    for number in range(2):
        with SGLang.started(tmp_path / str(number), model, world.socket, tmp_path / "weights") as engine:
            assert READ in engine.said
            assert ("the model is loaded as always: its tensors are others" in engine.said) == bool(number)
            engine.wake()
            assert engine.answers(*PROMPTS) == expected
    assert len(list((tmp_path / "weights").iterdir())) == 1


def test_a_cache_that_would_be_in_the_image_ends_the_engine(world: World, model: Path, tmp_path: Path) -> None:
    assert CACHE in FILES[RUNNER]
    files = FILES | {RUNNER: FILES[RUNNER].replace(CACHE, CACHE.replace("zeros", "ones"))}
    with (
        pytest.raises(AssertionError, match=r"makes its KV cache in a way that zerowake's adapter does not know"),
        SGLang.started(tmp_path, model, world.socket, tmp_path / "weights", files=files),
    ):
        pass
