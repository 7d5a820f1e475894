"""A model server on a GPU, as a snapshot sees one: a torch model with a captured CUDA graph, on weights that gpumem lends.

    python -m tests.worlds.torch_engine PORT SIZE      SIZE: qwen3-8b, small

With GPUMEM_REGION it computes on lent weights, else on random ones of its own.
It takes part in the control directory: it lets go of what is lent before a dump, and takes it again, at the same addresses, afterwards.
"""

import gc
import hashlib
import http.server
import json
import os
import sys
import threading
from collections.abc import Mapping

# Each hardware queue takes CUDA 6 ms to make anew when a process wakes, and there are eight unless said; one stream needs one.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch

from gpumem.client import Client
from gpumem.client.torch import ScratchPool, adopt, skeleton, torch_device
from restore_agent.workload.control_directory import ControlDirectory
from tests.worlds.checkpoints import SIZES
from tests.worlds.torch_model import Graph, Model

working = threading.Lock()  # held by whoever uses the GPU; and while the weights are away


class Sleep:
    """Lets go of what is lent, and takes it again at the same addresses. Begins with the GPU to itself."""

    def __init__(self, client: Client | None) -> None:
        self._client = client
        self._again = False

    def quiesce(self) -> None:
        if self._again:
            working.acquire()
        self._again = True
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        if self._client:
            self._client.quiesce()

    def resume(self, moved: Mapping[str, str]) -> None:
        if self._client:
            self._client.resume(moved=moved)
        working.release()


def main() -> None:
    port, size = int(sys.argv[1]), SIZES[sys.argv[2]]
    client = None
    if region := os.environ.get("GPUMEM_REGION"):
        client = Client(label="model server")
        torch.cuda.set_device(torch_device(client.device))
        lent = client.attach(bytes.fromhex(region), wait=600)
        with skeleton():
            model = Model(size)
        adopt(model, lent)
    else:
        torch.manual_seed(7)
        with torch.device("cuda"):
            model = Model(size)
    graph = Graph(model, ScratchPool(client).id if client else None)
    graph.run([0, 0, 0, 0])

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body: dict[str, object] = {}
            if self.path != "/health":
                with working:
                    logits = graph.run([3, 1, 4, 1])
                body = {"next": logits.argmax(-1).tolist(), "digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest()}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    if control := ControlDirectory.from_environment():
        working.acquire()  # before anybody can ask
        sleep = Sleep(client)
        control.start(sleep.quiesce, sleep.resume)
    server.serve_forever()


if __name__ == "__main__":
    main()
