"""A model in the shape of a language model's layers, with what makes one hard to share: tied parameters, computed buffers, a CUDA graph."""

from typing import Any

import torch
from torch import nn

from tests.worlds.checkpoints import Size


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        for name, columns, rows in (
            ("query", size.hidden, size.hidden), ("key", size.hidden, size.keys), ("value", size.hidden, size.keys),
            ("output", size.hidden, size.hidden), ("gate", size.hidden, size.inner), ("up", size.hidden, size.inner),
            ("down", size.inner, size.hidden),
        ):  # fmt: skip
            setattr(self, name, nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Any) -> Any:
        normal = nn.functional.rms_norm(x, x.shape[-1:])
        score = (self.key(normal) * self.value(normal)).mean(-1, keepdim=True)
        x = x + self.output(self.query(normal) * score)
        normal = nn.functional.rms_norm(x, x.shape[-1:])
        return x + self.down(nn.functional.silu(self.gate(normal)) * self.up(normal))


class Model(nn.Module):
    """Tokens, shape (n,), to logits, shape (n, vocabulary)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.hidden, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False, dtype=torch.bfloat16)
        # Computed, in no checkpoint: a module built on the meta device as a whole would have lost it.
        self.register_buffer("turn", torch.cos(torch.arange(size.hidden) / 7).to(torch.bfloat16), persistent=False)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens) * self.turn
        for layer in self.layers:
            x = layer(x)
        return self.head(nn.functional.rms_norm(x, x.shape[-1:]))


class Graph:
    """A model's step as a captured CUDA graph. `pool`: where it keeps what it computes; torch's own if not given."""

    def __init__(self, model: Model, pool: Any = None) -> None:
        self._tokens = torch.zeros(4, dtype=torch.long, device="cuda")
        with torch.no_grad():
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                model(self._tokens)  # libraries choose and set up what they need outside of the capture
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._logits = model(self._tokens)

    def run(self, tokens: list[int]) -> Any:
        self._tokens.copy_(torch.tensor(tokens))
        self._graph.replay()
        torch.cuda.synchronize()
        return self._logits.float().cpu()
