"""The torch adapter over the host's memory, where torch is installed: parameters move, are shared, and are told apart."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpumem.checkpoint.safetensors import read_checkpoint  # noqa: E402
from gpumem.client import Client  # noqa: E402
from gpumem.client.torch import adopt, fill, layout_of, skeleton  # noqa: E402
from gpumem.wire.errors import StaleLayout  # noqa: E402
from tests.worlds.checkpoints import SMALL, write_checkpoint  # noqa: E402
from tests.worlds.torch_model import Model  # noqa: E402

TOKENS = [3, 1, 4, 1]


class Tied(torch.nn.Module):
    """A parameter of two names, buffers that are computed, and buffers that training wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("turn", torch.arange(4) / 3, persistent=False)

    def forward(self, tokens: Any) -> Any:
        return self.head(self.norm(self.embed(tokens) * self.turn))


def publish(client: Client, name: bytes, module: Any) -> Any:
    region = client.begin(name * 32, layout_of(module))
    fill(module, region)
    region.seal()
    return region


def test_a_writers_module_answers_the_same_and_so_do_its_readers(client: Client) -> None:
    written = Tied().eval()
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        expected = written(tokens)
        region = publish(client, b"a", written)
        assert written.embed.weight.data_ptr() >= region.address
        assert torch.equal(written(tokens), expected)
        with skeleton():
            read = Tied().eval()
        assert read.embed.weight.is_meta and not read.turn.is_meta
        adopt(read, client.attach(region.id, region.capability))
        assert read.head.weight is read.embed.weight
        assert not read.embed.weight.requires_grad
        assert torch.equal(read(tokens), expected)
        client.quiesce()
        client.resume()
        assert torch.equal(read(tokens), expected)


def test_a_checkpoint_is_adopted_without_a_copy(client: Client, tmp_path: Path) -> None:
    from safetensors.torch import load_file  # noqa: PLC0415

    write_checkpoint(tmp_path / "weights", SMALL)
    checkpoint = read_checkpoint(tmp_path / "weights")
    region = client.attach(client.fill(checkpoint.layout, checkpoint.parts).id)
    with skeleton():
        model = Model(SMALL)
    adopt(model, region)
    expected = Model(SMALL)
    files = (tmp_path / "weights").glob("*.safetensors")
    expected.load_state_dict({name: tensor for path in files for name, tensor in load_file(path).items()})
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(TOKENS)), expected(torch.tensor(TOKENS)))
    assert all(region.address <= one.data_ptr() < region.address + region.size for one in model.parameters())


def test_another_models_weights_are_refused(client: Client) -> None:
    region = publish(client, b"b", Tied())
    with pytest.raises(StaleLayout, match=r"no tensor 'weight'"):
        adopt(torch.nn.Linear(4, 10), region)
    other = Tied()
    other.embed = torch.nn.Embedding(11, 4)
    with pytest.raises(StaleLayout, match=r"embed.weight.*10, 4.*11, 4"):
        adopt(other, region)
    with pytest.raises(StaleLayout, match=r"float64"):
        adopt(Tied().double(), region)
    lost = Tied()
    lost.register_buffer("made", torch.empty(3, device="meta"))
    with pytest.raises(StaleLayout, match=r"'made'.*torch.empty"):
        adopt(lost, region)
