"""Takes vLLM's command line and answers as an OpenAI-compatible server does, without a GPU: lending_chat_engine.py MODEL --port=PORT …

MODEL is a folder with a checkpoint of one tensor (`write_model`), and every answer hashes all of it. Where the packages are there that are
put into its container, the weights are published into gpumem from the container itself, as the vLLM adapter does; else they are read into
memory.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import random
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PUBLISHED = Path("/var/tmp/weights")  # in its container
FILE = "model.safetensors"
BYTES = 64 << 20
WORDS = 16
attached = threading.Lock()  # held while the weights are put away
weights: Callable[[], bytes]


def words_to(prompt: str) -> list[str]:
    """An answer that every byte of the weights bears on."""
    with attached:
        hashed = hashlib.sha256(prompt.encode() + weights())
    return [f" {byte}" for byte in hashed.digest()[:WORDS]]


class Handler(http.server.BaseHTTPRequestHandler):
    """One thread for each connection."""

    protocol_version = "HTTP/1.1"
    model = ""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": self.model}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self._answer({"error": "only /v1/completions"}, 404)
            return
        words = words_to(asked["prompt"])[: asked.get("max_tokens", WORDS)]
        choices = [{"text": word, "index": 0, "logprobs": {"token_logprobs": [-0.25]}} for word in words]
        if asked.get("stream"):
            self._stream(choices)
        else:
            whole = {"text": "".join(words), "index": 0, "logprobs": {"token_logprobs": [-0.25] * len(words)}}
            self._answer({"object": "text_completion", "choices": [whole]})

    def _stream(self, choices: list[dict[str, Any]]) -> None:
        events = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices] + ["data: [DONE]\n\n"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in [*events, ""]:
            self.wfile.write(f"{len(event.encode()):x}\r\n{event}\r\n".encode())

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """The kubelet asks for its health every second."""


def write_model(folder: Path) -> None:
    """What this engine loads; the same each time."""
    header = json.dumps({"weights": {"dtype": "U8", "shape": [BYTES], "data_offsets": [0, BYTES]}}).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(struct.pack("<Q", len(header)) + header + random.Random(5).randbytes(BYTES))


def lend(model: Path) -> Callable[[], bytes]:
    """Weights in gpumem, and a part in the control directory. Raises: ImportError, this container was given nothing for it."""
    from gpumem.checkpoint.safetensors import kept_reading  # noqa: PLC0415
    from gpumem.client import Client  # noqa: PLC0415
    from restore_agent.workload.control_directory import ControlDirectory  # noqa: PLC0415

    shutil.copytree(model, PUBLISHED)
    found = kept_reading(PUBLISHED)
    assert found, f"{model} has no reading beside its checkpoint"
    client = Client()
    region = client.attach(client.fill(found.layout, found.parts).id)
    offset = found.layout.tensors[0].offset

    def quiesce() -> None:
        attached.acquire()
        client.quiesce()

    def resume(moved: Mapping[str, str]) -> None:
        client.resume(moved=moved)
        attached.release()

    if control := ControlDirectory.from_environment():
        control.name_weights(PUBLISHED)
        control.start(quiesce, resume)
    return lambda: bytes(region.view()[offset : offset + BYTES])


def main() -> None:
    global weights  # noqa: PLW0603
    model, options = Path(sys.argv[1]), dict(word.lstrip("-").split("=", 1) for word in sys.argv[2:])
    Handler.model = options["served-model-name"]
    server = http.server.ThreadingHTTPServer(("", int(options["port"])), Handler, bind_and_activate=False)
    server.server_bind()
    try:
        weights = lend(model)
    except ImportError:
        content = (model / FILE).read_bytes()[-BYTES:]
        weights = lambda: content  # noqa: E731
    server.server_activate()  # it answers from now on
    server.serve_forever()


if __name__ == "__main__":
    main()
