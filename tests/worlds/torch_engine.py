"""A model server on a GPU, as a snapshot sees one: a torch model with a captured CUDA graph, on weights that gpumem lends.

    python -m tests.worlds.torch_engine PORT SIZE      SIZE: qwen3-8b, small

With GPUMEM_REGION it computes on lent weights, else on random ones of its own.
It takes part in the control directory: it lets go of what is lent before a dump, and takes it again, at the same addresses, afterwards.
"""

import gc
import hashlib
import os
import sys
import threading
from collections.abc import Mapping
from http import HTTPStatus

# Each hardware queue takes CUDA 6 ms to make anew when a process wakes, and there are eight unless said; one stream needs one.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import torch

from gpumem.client import Client
from gpumem.client.torch import ScratchPool, adopt, skeleton, torch_device
from restore_agent.workload.control_directory import ControlDirectory
from tests.worlds.checkpoints import SIZES
from tests.worlds.json_answers import json_server
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

    def answer(path: str) -> tuple[HTTPStatus, object]:
        if path == "/health":
            return HTTPStatus.OK, {}
        with working:
            logits = graph.run([3, 1, 4, 1])
        return HTTPStatus.OK, {"next": logits.argmax(-1).tolist(), "digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest()}

    server = json_server(port, answer)
    if control := ControlDirectory.from_environment():
        working.acquire()  # before anybody can ask
        sleep = Sleep(client)
        control.start(sleep.quiesce, sleep.resume)
    server.serve_forever()


if __name__ == "__main__":
    main()
