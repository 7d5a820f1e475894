"""Random weights in the shape of a language model, as the checkpoint directory that one would download."""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ONE = 0x3F80  # in bf16
POOL = (64 << 20) + 12345  # random numbers made once; a tensor is a stretch of them that begins where the last one's ended


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    inner: int
    keys: int  # the width of keys and of values
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, int]]]:
        yield "embed.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in {
                "query": (self.hidden, self.hidden), "key": (self.keys, self.hidden), "value": (self.keys, self.hidden),
                "output": (self.hidden, self.hidden), "gate": (self.inner, self.hidden), "up": (self.inner, self.hidden),
                "down": (self.hidden, self.inner),
            }.items():  # fmt: skip
                yield f"layers.{layer}.{name}.weight", shape
        yield "head.weight", (self.vocabulary, self.hidden)

    @property
    def bytes(self) -> int:
        return sum(2 * rows * columns for _, (rows, columns) in self.tensors())


@dataclass(frozen=True)
class Qwen3:
    """The tensors of a Qwen3 model, as its own checkpoints name them, from its config.json."""

    config: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, inner, head = self.config["hidden_size"], self.config["intermediate_size"], self.config["head_dim"]
        queries, keys = head * self.config["num_attention_heads"], head * self.config["num_key_value_heads"]
        yield "model.embed_tokens.weight", (self.config["vocab_size"], hidden)
        for layer in range(self.config["num_hidden_layers"]):
            for name, shape in {
                "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
                "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            }.items():  # fmt: skip
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.config["vocab_size"], hidden)


QWEN3_8B = Size(layers=36, hidden=4096, inner=12288, keys=1024, vocabulary=151936)  # its 16.4 GB
SMALL = Size(layers=2, hidden=512, inner=1536, keys=128, vocabulary=4096)  # 16 MB
SIZES = {"qwen3-8b": QWEN3_8B, "small": SMALL}


def write_checkpoint(directory: Path, size: Size | Qwen3, shards: int = 4) -> None:
    """Writes bf16 weights as `shards` files and their index; all of them are in page cache then, and perhaps on the disk.

    Matrices are normally distributed with a deviation of 0.02, as models begin their training; vectors (norms) are ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(20).standard_normal(POOL, dtype=np.float32)
    random *= 0.02
    pool: NDArray[np.uint16] = (random.view(np.uint32) >> 16).astype(np.uint16)
    tensors = list(size.tensors())
    share = -(-len(tensors) // shards)
    groups = [tensors[at : at + share] for at in range(0, len(tensors), share)]
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    with ThreadPoolExecutor(len(groups)) as threads:
        list(
            threads.map(
                _write_shard,
                (directory / name for name in names),
                groups,
                (i * POOL // 7 for i in range(len(groups))),
                [pool] * len(groups),
            )
        )
    index = {"weight_map": {tensor: name for name, group in zip(names, groups, strict=True) for tensor, _ in group}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], begin: int, pool: NDArray[np.uint16]) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # as the safetensors library does
    with path.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, shape in tensors:
            left = math.prod(shape)
            if len(shape) == 1:
                file.write(np.full(left, _ONE, np.uint16).data)
                continue
            while left:
                count = min(left, POOL - begin % POOL)
                left -= file.write(pool[begin % POOL : begin % POOL + count].data) // 2
                begin += count
