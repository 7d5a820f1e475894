"""A model's weights as they are after loading, over the host's memory, where torch is installed: found, published, and mapped again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpumem.checkpoint.safetensors import kept_reading  # noqa: E402
from gpumem.client import Client, StaleLayout  # noqa: E402
from restore_agent.workload.lent_weights import addresses, adopt, directory_name, fits, held, publish, weight_files  # noqa: E402

TOKENS = [3, 1, 4, 1]


class Engine(torch.nn.Module):
    """What engines do to weights: a tie, a transposed view, a matrix beside the parameters, and a buffer that is written."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(300, 128)
        self.head = torch.nn.Linear(128, 300, bias=False)
        self.head.weight = self.embed.weight
        self.fused = torch.nn.Parameter(torch.randn(128, 200).t(), requires_grad=False)
        self.absorbed = torch.randn(200, 128)
        self.scale = torch.nn.Parameter(torch.ones(1))  # so short that what comes next is aligned
        self.register_buffer("count", torch.zeros(40000))
        self.requires_grad_(False)

    def forward(self, tokens: Any) -> Any:
        self.count += 1
        return self.head(self.embed(tokens) @ self.fused.t() @ self.absorbed) * self.scale


def lend(client: Client, directory: Path, model: Any, before: set[int]) -> Any:
    weights = held(client, model, before)
    checkpoint = kept_reading(directory) or publish(directory, model, weights)
    assert fits(checkpoint, weights)
    lent = client.fill(checkpoint.layout, checkpoint.parts)
    region = client.attach(lent.id, lent.capability)
    adopt(region, weights)
    return region


def test_a_second_process_s_model_has_the_first_one_s_weights(client: Client, tmp_path: Path) -> None:
    tokens, directory = torch.tensor(TOKENS), tmp_path / "weights/model-1"
    before = addresses(client)
    first = Engine(seed=1)
    expected = first(tokens)
    region = lend(client, directory, first, before)
    assert torch.equal(first(tokens), expected)
    assert first.head.weight.data_ptr() == first.embed.weight.data_ptr()
    inside = range(region.address, region.address + region.size)
    assert all(each.data_ptr() in inside for each in (first.embed.weight, first.fused, first.absorbed))
    assert first.count.data_ptr() not in inside and first.count[0] == 2, "buffers stay the process's own"
    assert not first.fused.is_contiguous()

    before = addresses(client)
    second = Engine(seed=2)
    assert not torch.equal(second(tokens), expected)
    again = lend(client, directory, second, before)
    assert again.id == region.id
    client.quiesce()
    client.resume()
    assert torch.equal(second(tokens), expected) and torch.equal(first(tokens), expected)


def test_what_no_module_knows_is_found_out(client: Client) -> None:
    before = addresses(client)
    kept = [torch.randn(200, 200)]
    model = Engine(seed=1)
    with pytest.raises(StaleLayout, match=r"\(200, 200\) of torch.float32 was made while loading and belongs to no module"):
        held(client, model, before)
    before = addresses(client)
    assert kept and held(client, Engine(seed=1), before)


def test_another_model_does_not_fit_and_is_not_touched(client: Client, tmp_path: Path) -> None:
    before = addresses(client)
    model = Engine(seed=1)
    region = lend(client, tmp_path / "weights/model-1", model, before)
    checkpoint = kept_reading(tmp_path / "weights/model-1")
    assert checkpoint
    before = addresses(client)
    other = Engine(seed=1)
    other.absorbed = torch.randn(201, 128)
    weights = held(client, other, before)
    assert not fits(checkpoint, weights)
    own = other.embed.weight.data_ptr()
    with pytest.raises(StaleLayout, match=r"no '.absorbed' of 102912 bytes: remove its checkpoint directory"):
        adopt(region, weights)
    assert other.embed.weight.data_ptr() == own
    before = addresses(client)
    fewer = Engine(seed=1)
    del fewer.absorbed
    assert not fits(checkpoint, held(client, fewer, before))


def test_a_directory_is_named_by_what_makes_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "config.json").write_text("{}")
    ((name, size, _),) = weight_files(tmp_path)
    assert (name, size) == ("model.safetensors", 1)
    assert directory_name("/models/Qwen3-1.7B", ["a", 1]).startswith("qwen3-1-7b-")
    assert directory_name("/models/m", ["a", 1]) == directory_name("/models/m", ["a", 1]) != directory_name("/models/m", ["a", 2])
