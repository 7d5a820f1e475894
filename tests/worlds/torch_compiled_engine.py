"""A torch model on processors that torch.compile makes kernels of, as engines on GPUs do: `torch_compiled_engine.py PORT`.

`/sum` computes. TorchInductor writes C++, has it compiled, and keeps the libraries in its cache.
"""

import http.server
import json
import sys

import torch

LAYERS, WIDTH = 4, 256


class Layer(torch.nn.Module):
    """Attention and a gated feed-forward layer."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.mixed = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.wide = torch.nn.Linear(WIDTH, (4 + at) * WIDTH)  # no two layers alike, so that each is compiled
        self.back = torch.nn.Linear((4 + at) * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mixed(self.norm(x)).chunk(3, -1)
        x = x + torch.softmax(query @ key.transpose(-1, -2) / WIDTH**0.5, -1) @ value
        return x + self.back(torch.nn.functional.gelu(self.wide(self.norm(x))))


def main() -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*(Layer(at) for at in range(LAYERS))).eval()
    compiled = torch.compile(model)
    asked = torch.linspace(-1, 1, 16 * WIDTH).reshape(1, 16, WIDTH)

    def answer() -> float:
        with torch.inference_mode():
            return round(float(compiled(asked).sum()), 3)

    answer()

    class Handler(http.server.BaseHTTPRequestHandler):
        """What the model computes."""

        def do_GET(self) -> None:
            body = json.dumps("well" if self.path == "/health" else answer()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nobody reads it."""

    http.server.HTTPServer(("", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
