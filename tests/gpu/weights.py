"""Random weights in the shape of a language model, as the checkpoint directory that one would download."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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


QWEN3_8B = Size(layers=36, hidden=4096, inner=12288, keys=1024, vocabulary=151936)  # its 16.4 GB
SMALL = Size(layers=2, hidden=512, inner=1536, keys=128, vocabulary=4096)  # 16 MB


def write_checkpoint(directory: Path, size: Size, shards: int = 4) -> None:
    """Writes bf16 weights as `shards` files and their index; all of them are in page cache then, and perhaps on the disk."""
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


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, int]]], begin: int, pool: NDArray[np.uint16]) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, (rows, columns) in tensors:
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + 2 * rows * columns]}
        end += 2 * rows * columns
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # as the safetensors library does
    with path.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        while end:
            count = min(end // 2, POOL - begin % POOL)
            stretch = pool[begin % POOL : begin % POOL + count]
            end -= file.write(stretch.data)
            begin += count
