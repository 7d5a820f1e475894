"""vLLM's own code that takes the memory of its KV cache, found in its sources and run with stand-ins for all that it calls.

What the adapter reserves must be what that code asks for, in the form that the adapter intercepts: `torch.zeros(SIZE, dtype=torch.int8)`.
"""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from restore_agent.workload.fitting import Function

RUNNERS = ("vllm/v1/worker/gpu_model_runner.py", "vllm/v1/worker/gpu/attn_utils.py")  # of vLLM's two model runners
FILES = (*RUNNERS, "vllm/v1/worker/utils.py")  # the last for both of them, from 0.29 on


@dataclass(frozen=True)
class Allocator:
    """A function that makes tensors of bytes."""

    file: str
    node: Function

    def __str__(self) -> str:
        return f"{self.node.name} of {self.file}"

    @property
    def calls(self) -> list[ast.Call]:
        return [node for node in ast.walk(self.node) if isinstance(node, ast.Call) and _is_of_bytes(node)]

    def run(self, tensors: list[SimpleNamespace]) -> list[int]:
        """The sizes that it asks for, in order, for a cache of these tensors."""
        asked: list[int] = []

        def zeros(*size: int, dtype: object, device: object) -> MagicMock:
            assert dtype == "int8" and len(size) == 1
            asked.append(size[0])
            return MagicMock()

        names = {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)} - vars(builtins).keys()
        world: dict[str, Any] = {name: MagicMock() for name in names}
        world |= {name: type(name, (), {}) for name in self._types()}
        world["torch"] = SimpleNamespace(zeros=zeros, int8="int8")
        world["current_platform"] = MagicMock(is_rocm=lambda: False)
        exec(compile(ast.Module([self._bare()], type_ignores=[]), self.file, "exec"), world)
        layers = [name for tensor in tensors for name in tensor.layers]
        config = MagicMock(kv_cache_tensors=tensors, kv_cache_groups=[MagicMock(layer_names=layers)])
        given = {"kv_cache_config": config, "shared_layers": {}}
        parameters = self.node.args.args[: len(self.node.args.args) - len(self.node.args.defaults)]
        world[self.node.name](**{each.arg: given.get(each.arg, MagicMock()) for each in parameters})
        return asked

    def _bare(self) -> Function:
        """Without what is evaluated as it is defined."""
        bare = ast.parse(ast.unparse(self.node)).body[0]
        assert isinstance(bare, Function)
        bare.decorator_list, bare.returns = [], None
        for node in ast.walk(bare):
            if isinstance(node, ast.arg):
                node.annotation = None
        return bare

    def _types(self) -> set[str]:
        """The names that are asked for by `isinstance`, and have to be classes."""
        asked = [node for node in ast.walk(self.node) if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"]
        return {name.id for call in asked for name in ast.walk(call.args[1]) if isinstance(name, ast.Name)} - vars(builtins).keys()


def allocators(texts: dict[str, str]) -> list[Allocator]:
    """Whatever makes tensors of bytes in these files."""
    found = [
        Allocator(file, node)
        for file, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, Function) and "allocate" in node.name and "kv_cache" in node.name
    ]
    return [each for each in found if each.calls]


def caches(fields: dict[str, bool]) -> dict[str, list[SimpleNamespace]]:
    """Caches such as a version makes them. `fields`: those of its KVCacheTensor, and whether each has a default."""
    own = [SimpleNamespace(size=size, block_stride=0, layers=[str(size)], shared_by=[str(size)]) for size in (4 << 20, 6 << 20)]
    # Of a model that has a state space beside attention, or a window beside all: a memory is a layer's of each kind.
    kinds = {size: [str(size), f"{size} too"] for size in (4 << 20, 6 << 20)}
    mixed = [SimpleNamespace(size=size, block_stride=0, layers=names, shared_by=names) for size, names in kinds.items()]
    shared = [
        SimpleNamespace(size=10 << 20, block_stride=64, layer_stride=64, offset=at, layers=[str(at)], shared_by=[str(at)]) for at in (0, 64)
    ]
    if "block_stride" not in fields:
        return {"each with memory of its own": own, "of two kinds of layers": mixed}
    alone = {"each with memory of its own": own, "of two kinds of layers": mixed} if fields["block_stride"] else {}
    return {"all in one memory": shared} | alone


def _is_of_bytes(call: ast.Call) -> bool:
    return any(each.arg == "dtype" and ast.unparse(each.value) == "torch.int8" for each in call.keywords)
