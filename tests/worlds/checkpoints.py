"""Random weights in the shape of a language model, as the checkpoint directory that one would download."""

import itertools
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tests.worlds.model_shapes import Shape, Tensor

DEVIATION = 0.02
_ONE = 0x3F80  # in bf16
_SCALE = 127 - 6  # as a power of two: numbers of 4 bits are up to 6
POOL = (64 << 20) + 12345  # random numbers made once, at most; a tensor is a stretch of them that begins where the last one's ended


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
SIZES = {"qwen3-8b": QWEN3_8B, "small": SMALL}


def write_checkpoint(directory: Path, size: Size | Shape, shards: int = 4, seed: int = 20) -> None:
    """Writes weights as `shards` files and their index; all of them are in page cache then, and perhaps on the disk.

    Matrices are normally distributed with a deviation of 0.02, as models begin their training, also where a scale makes them so; norms are
    ones. Two seeds make two models.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = [Tensor(*each) for each in size.tensors()]
    content = Content(seed, min(POOL, sum(math.prod(tensor.shape) for tensor in tensors)))
    share = -(-len(tensors) // shards)
    groups = [tensors[at : at + share] for at in range(0, len(tensors), share)]
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    with ThreadPoolExecutor(len(groups)) as threads:
        begins = [i * POOL // 7 for i in range(len(groups))]
        list(threads.map(_write_shard, (directory / name for name in names), groups, begins, itertools.repeat(content)))
    index = {"weight_map": {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


class Content:
    """The numbers that tensors are made of: of each type so many, made once."""

    def __init__(self, seed: int, size: int) -> None:
        self.size = size
        self._seed = seed
        self._making = threading.Lock()
        self._pools: dict[str, NDArray[Any]] = {}

    def constant(self, tensor: Tensor) -> NDArray[Any] | None:
        """What is no random number; None: it is."""
        last = tensor.name.rpartition(".")[2]
        if tensor.dtype == "F32":
            return np.full(tensor.shape, DEVIATION, np.float32)
        if last == "A_log":  # decays that differ, from head to head
            return _bf16(np.log(1 + np.arange(math.prod(tensor.shape), dtype=np.float32) % 16))
        if len(tensor.shape) == 1 and last in ("weight", "D"):
            return np.full(tensor.shape, _ONE, np.uint16)
        if last.endswith("_scales"):
            return np.full(tensor.shape, _SCALE, np.uint8)
        return None

    def pool(self, dtype: str) -> NDArray[Any]:
        with self._making:
            if dtype not in self._pools:
                self._pools[dtype] = self._made(dtype)
            return self._pools[dtype]

    def _made(self, dtype: str) -> NDArray[Any]:
        random = np.random.default_rng([self._seed, *dtype.encode()])  # whichever shard asks for its type first
        if dtype == "BF16":
            numbers = random.standard_normal(self.size, dtype=np.float32)
            numbers *= DEVIATION
            return _bf16(numbers)
        made = random.integers(0, 256, self.size, dtype=np.uint8)
        # Of 8 bits: a sign, an exponent of -2 to 0, a fraction. None is an infinity or no number.
        return (made & 0x87) | (5 + (made >> 3) % 3 << 3) if dtype == "F8_E4M3" else made


def _bf16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def _write_shard(path: Path, tensors: list[Tensor], begin: int, content: Content) -> None:
    header: dict[str, object] = {}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.bytes]}
        end += tensor.bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # as the safetensors library does
    with path.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            if (constant := content.constant(tensor)) is not None:
                _write_all(file, constant)
                continue
            pool = content.pool(tensor.dtype)
            left = math.prod(tensor.shape)
            while left:
                at = begin % content.size
                count = min(left, content.size - at)
                _write_all(file, pool[at : at + count])
                left -= count
                begin += count


def _write_all(file: IO[bytes], numbers: NDArray[Any]) -> None:
    left = memoryview(np.ascontiguousarray(numbers).reshape(-1)).cast("B")
    while left:
        left = left[file.write(left) :]
