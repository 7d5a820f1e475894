"""The models of the GPU benchmarks: as large as the published ones, of their whole vocabulary, readable, and each another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize
from tokenizers import Tokenizer

from tests.worlds.checkpoints import write_checkpoint
from tests.worlds.model_files import SPECIAL, write_model, write_tokenizer
from tests.worlds.model_shapes import SHAPES, Shape, shape_named

# GB of the files that are published, and words.
PUBLISHED = {
    "qwen3-8b": (16.38, 151_936),
    "qwen3-0.6b": (1.19, 151_936),  # without the copy of the embedding that is published beside it
    "llama-3.1-8b": (16.06, 128_256),
    "llama-3.1-70b-fp8": (72.7, 128_256),
    "gpt-oss-120b": (65.25, 201_088),
    "granite-3.3-2b": (5.07, 49_159),
}
TINY = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 1024, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "num_local_experts": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
}  # fmt: skip


def tiny(name: str) -> Shape:
    """The family and the quantization of a model, at a size that takes no time."""
    config = shape_named(name).config
    return Shape(name, config | {key: value for key, value in TINY.items() if key in config})


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_a_shape_is_as_large_as_the_model(name: str, published: tuple[float, int]) -> None:
    shape = shape_named(name)
    assert (shape.bytes / 1e9, shape.vocabulary) == (pytest.approx(published[0], abs=0.05), published[1])


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_is_whole_and_its_numbers_are_numbers(name: str, tmp_path: Path) -> None:
    shape = tiny(name)
    write_model(tmp_path / "model", shape)
    read = [each for file in (tmp_path / "model").glob("*.safetensors") for each in deserialize(file.read_bytes())]
    found = {key: (tuple(tensor["shape"]), tensor["dtype"], len(tensor["data"])) for key, tensor in read}
    assert found == {tensor.name: (tensor.shape, tensor.dtype, tensor.bytes) for tensor in shape.tensors()}
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == found.keys()
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert Tokenizer.from_file(str(tmp_path / "model/tokenizer.json")).id_to_token(config["eos_token_id"]) == "<|im_end|>"


def test_eight_bits_are_finite_and_spread(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny("llama-3.1-70b-fp8"), shards=1)
    (file,) = tmp_path.glob("*.safetensors")
    raw = np.frombuffer(dict(deserialize(file.read_bytes()))["model.layers.0.mlp.up_proj.weight"]["data"], np.uint8).astype(int)
    numbers = np.where(raw & 0x80, -1, 1) * 2.0 ** ((raw >> 3 & 15) - 7) * (1 + (raw & 7) / 8)
    assert abs(numbers).max() < 2 and 0.5 < numbers.std() < 1 and abs(numbers.mean()) < 0.1


def digest(folder: Path) -> str:
    files = sorted(folder.iterdir())
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def test_a_model_is_the_same_each_time_and_another_than_the_others(tmp_path: Path) -> None:
    shape = tiny("qwen3-8b")
    for place, model in (("one", shape), ("again", shape), ("other", Shape("another", shape.config))):
        write_model(tmp_path / place, model)
    assert digest(tmp_path / "one") == digest(tmp_path / "again") != digest(tmp_path / "other")


def test_a_model_that_stands_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / ".model").mkdir()  # of a command that was ended while it wrote
    write_model(tmp_path / "model", tiny("qwen3-8b"))
    (tmp_path / "model/config.json").write_text("kept")
    write_model(tmp_path / "model", tiny("qwen3-8b"))
    assert (tmp_path / "model/config.json").read_text() == "kept"


@pytest.mark.parametrize("vocabulary", [49_159, 151_936, 201_088])
def test_every_word_is_a_text_of_its_own(vocabulary: int, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocabulary)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocabulary
    said = "One, two, three: Grüße, 日本\n"
    assert tokenizer.decode(tokenizer.encode(said).ids) == said
    last = tokenizer.decode(range(vocabulary - 10, vocabulary), skip_special_tokens=False)
    assert last.endswith("".join(SPECIAL)) and len(last) > len("".join(SPECIAL)) + 7
    assert len(tokenizer.encode("chat").ids) <= 2, "words are merged, as those of a real one are"


def test_a_vocabulary_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a tokenizer of 100 words"):
        write_tokenizer(tmp_path, 100)
