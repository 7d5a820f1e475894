"""Language models by their shape: of a config.json, as it is published, every tensor of the checkpoint, as that names it.

The configs are data, in tests/bench/gpu/shapes/. What a family of models adds to the ordinary decoder stands here: biases, norms of queries
and keys, weights of 8 bits with their scales, experts of 4 bits in blocks, state-space layers beside attention.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "bench/gpu/shapes"
SHAPES = sorted(path.stem for path in FOLDER.glob("*.json"))
WIDTHS = {"BF16": 2, "F8_E4M3": 1, "U8": 1, "F32": 4}  # bytes
_MXFP4_BLOCK = 32  # numbers of 4 bits that share a scale


class Tensor(NamedTuple):
    """One of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype]


@dataclass(frozen=True)
class Shape:
    """A model: its name here, and its config.json."""

    name: str
    config: dict[str, Any]

    def __str__(self) -> str:
        tensors = list(self.tensors())
        return f"{self.name}: {self.bytes / 1e9:.2f} GB of weights in {len(tensors)} tensors, {self.vocabulary:,} words"

    def tensors(self) -> Iterator[Tensor]:
        return _FAMILIES[self.config["architectures"][0]](self).tensors()

    @cached_property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors())

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def head(self) -> int:
        """Numbers in one head of attention."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])


def shape_named(name: str) -> Shape:
    return Shape(name, json.loads((FOLDER / f"{name}.json").read_text()))


@dataclass(frozen=True)
class Decoder:
    """Attention and a gated perceptron in each layer: Llama, Granite, and what differs from them by a word."""

    shape: Shape
    query_bias: bool = False
    head_norms: bool = False

    def tensors(self) -> Iterator[Tensor]:
        hidden, words = self.shape.config["hidden_size"], self.shape.vocabulary
        yield Tensor("model.embed_tokens.weight", (words, hidden))
        for layer in range(self.shape.layers):
            yield from self.layer(f"model.layers.{layer}")
        yield Tensor(self.last_norm, (hidden,))
        if not self.shape.config["tie_word_embeddings"]:
            yield Tensor("lm_head.weight", (words, hidden))

    last_norm = "model.norm.weight"

    def layer(self, at: str) -> Iterator[Tensor]:
        yield from self.attention(f"{at}.self_attn")
        yield from self.perceptron(f"{at}.mlp")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(f"{at}.{norm}.weight", (self.shape.config["hidden_size"],))

    def attention(self, at: str) -> Iterator[Tensor]:
        config, head = self.shape.config, self.shape.head
        hidden, queries, keys = config["hidden_size"], head * config["num_attention_heads"], head * config["num_key_value_heads"]
        every = bool(config.get("attention_bias"))
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield from self.linear(f"{at}.{name}", rows, hidden, bias=every or self.query_bias)
        yield from self.linear(f"{at}.o_proj", hidden, queries, bias=every)
        if self.head_norms:
            yield from (Tensor(f"{at}.{name}.weight", (head,)) for name in ("q_norm", "k_norm"))

    def perceptron(self, at: str) -> Iterator[Tensor]:
        hidden, inner = self.shape.config["hidden_size"], self.shape.config["intermediate_size"]
        for name, rows, columns in (("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)):
            yield from self.linear(f"{at}.{name}", rows, columns)

    def linear(self, at: str, rows: int, columns: int, *, bias: bool = False) -> Iterator[Tensor]:
        if self.shape.config.get("quantization_config", {}).get("quant_method") == "fp8":
            yield Tensor(f"{at}.weight", (rows, columns), "F8_E4M3")
            yield Tensor(f"{at}.weight_scale", (), "F32")
        else:
            yield Tensor(f"{at}.weight", (rows, columns))
        if bias:
            yield Tensor(f"{at}.bias", (rows,))


class Qwen2(Decoder):
    """With biases for queries, keys and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, query_bias=True)


class Qwen3(Decoder):
    """With a norm for each head's queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, head_norms=True)


class GptOss(Decoder):
    """Experts of 4 bits in the perceptron's place, and a number for each head that takes attention to itself."""

    def linear(self, at: str, rows: int, columns: int, *, bias: bool = False) -> Iterator[Tensor]:
        yield Tensor(f"{at}.weight", (rows, columns))
        if bias:
            yield Tensor(f"{at}.bias", (rows,))

    def attention(self, at: str) -> Iterator[Tensor]:
        yield from super().attention(at)
        yield Tensor(f"{at}.sinks", (self.shape.config["num_attention_heads"],))

    def perceptron(self, at: str) -> Iterator[Tensor]:
        config = self.shape.config
        experts, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
        yield from self.linear(f"{at}.router", experts, hidden, bias=True)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            blocks = columns // _MXFP4_BLOCK
            yield Tensor(f"{at}.experts.{name}_blocks", (experts, rows, blocks, _MXFP4_BLOCK // 2), "U8")
            yield Tensor(f"{at}.experts.{name}_scales", (experts, rows, blocks), "U8")
            yield Tensor(f"{at}.experts.{name}_bias", (experts, rows))


class FalconH1(Decoder):
    """A state space beside attention in each layer."""

    last_norm = "model.final_layernorm.weight"

    def layer(self, at: str) -> Iterator[Tensor]:
        config = self.shape.config
        hidden, inner, heads = config["hidden_size"], config["mamba_d_ssm"], config["mamba_n_heads"]
        states = 2 * config["mamba_n_groups"] * config["mamba_d_state"]
        yield from self.attention(f"{at}.self_attn")
        yield from self.perceptron(f"{at}.feed_forward")
        for name in ("A_log", "D", "dt_bias"):
            yield Tensor(f"{at}.mamba.{name}", (heads,))
        yield Tensor(f"{at}.mamba.conv1d.weight", (inner + states, 1, config["mamba_d_conv"]))
        yield Tensor(f"{at}.mamba.conv1d.bias", (inner + states,))
        yield from self.linear(f"{at}.mamba.in_proj", 2 * inner + states + heads, hidden)
        yield from self.linear(f"{at}.mamba.out_proj", hidden, inner)
        for norm in ("input_layernorm", "pre_ff_layernorm"):
            yield Tensor(f"{at}.{norm}.weight", (hidden,))


_FAMILIES: dict[str, Any] = {
    "LlamaForCausalLM": Decoder,
    "GraniteForCausalLM": Decoder,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "GptOssForCausalLM": GptOss,
    "FalconH1ForCausalLM": FalconH1,
}
