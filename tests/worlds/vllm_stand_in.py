"""In vLLM's place on a machine without a GPU: `python -m tests.worlds.vllm_stand_in serve MODEL [OPTION…]`, with the options that vLLM has.

With the adapter's (`--load-format gpumem`) it does on gpumem's host memory what the adapter does on a GPU: it publishes the weights into
the folder of checkpoints, has them filled and attaches them, takes scratch for a KV cache, and plays its part in the control directory.
Without, it reads the model's files. Either way it streams an answer that is made of the weights and of the prompt, a number a word.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gpumem.checkpoint.safetensors import keep_reading, kept_reading, read_checkpoint
from gpumem.client import Client, Region
from restore_agent.workload.control_directory import ControlDirectory

CACHE = 32 << 20  # bytes of scratch at most, whatever the command says


class Model:
    """What answers: words made of a hash of the weights."""

    def __init__(self) -> None:
        self.awake = threading.Event()
        self.awake.set()

    def digest(self) -> bytes:
        raise NotImplementedError

    def answer(self, prompt: str, count: int) -> Iterator[tuple[str, float]]:
        """Words, and how likely each is."""
        self.awake.wait()
        said = hashlib.sha256(self.digest() + prompt.encode()).digest()
        for at in range(count):
            yield f" {said[at % len(said)]}", -said[at % len(said)] / 100


class FromFiles(Model):
    """As vLLM is without zerowake."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._layout = read_checkpoint(directory).layout.SerializeToString(deterministic=True)  # with the hashes of all chunks

    def digest(self) -> bytes:
        return hashlib.sha256(self._layout).digest()


class Lent(Model):
    """On gpumem's memory. Its answer needs every byte: what was lent wrongly would be another answer."""

    def __init__(self, directory: Path, checkpoints: Path, cache: int) -> None:
        super().__init__()
        self.published = checkpoints / directory.name
        if not self.published.exists():
            checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.copytree(directory, self.published)
        if (found := kept_reading(self.published)) is None:
            found = read_checkpoint(self.published)
            keep_reading(self.published, found)
        self._layout = found.layout.SerializeToString(deterministic=True)
        self._client = Client(label="vllm stand-in")
        lent = self._client.fill(found.layout, found.parts)
        self._region: Region = self._client.attach(lent.id, lent.capability)
        self._scratch = self._client.scratch(min(cache, CACHE))
        self._expected = self._sum()

    def _sum(self) -> bytes:
        return hashlib.sha256(self._region.view()).digest()

    def digest(self) -> bytes:
        return hashlib.sha256(self._layout).digest() if self._sum() == self._expected else b"not what was lent"

    def quiesce(self) -> None:
        self.awake.clear()
        self._client.quiesce()

    def resume(self, moved: Mapping[str, str]) -> None:
        self._client.resume(moved=moved)
        self.awake.set()


class Handler(BaseHTTPRequestHandler):
    """OpenAI's completions, streamed or whole."""

    model: Model
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._whole({}, 200 if self.model.awake.is_set() else 503)
        else:
            self._whole({"object": "list", "data": [{"id": "model", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = list(self.model.answer(asked["prompt"], asked["max_tokens"]))
        if not asked.get("stream"):
            self._whole(_completion("".join(word for word, _ in words), [number for _, number in words]))
            return
        events = [f"data: {json.dumps(_completion(word, [number]))}\n\n" for word, number in words]
        content = "".join([*events, "data: [DONE]\n\n"]).encode()
        self._head(200, "text/event-stream", len(content))
        self.wfile.write(content)

    def _whole(self, body: Mapping[str, object], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self._head(status, "application/json", len(content))
        self.wfile.write(content)

    def _head(self, status: int, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        """Nobody reads it."""


def _completion(text: str, numbers: list[float]) -> dict[str, object]:
    choice = {"index": 0, "text": text, "logprobs": {"token_logprobs": numbers}, "finish_reason": None}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "model", "choices": [choice]}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("serve")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--model-loader-extra-config", type=json.loads, default={})
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=CACHE)
    asked, _ = parser.parse_known_args()
    if asked.load_format == "gpumem":
        lent = Lent(asked.model, Path(asked.model_loader_extra_config["checkpoints"]), asked.kv_cache_memory_bytes)
        Handler.model = lent
    else:
        Handler.model = FromFiles(asked.model)
    server = ThreadingHTTPServer(("127.0.0.1", asked.port), Handler)
    if asked.load_format == "gpumem" and (control := ControlDirectory.from_environment()):
        control.name_weights(lent.published)
        control.start(lent.quiesce, lent.resume)
    server.serve_forever()


if __name__ == "__main__":
    main()
