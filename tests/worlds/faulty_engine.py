"""A model server on lent weights, as a snapshot sees one, that does wrong when it is told to.

It is started by `python -m tests.worlds.faulty_engine PORT SIZE`.

FAULT names a file. What stands in it when the server goes to sleep, or wakes, is what goes wrong then:

    busy      asleep, with a kernel that runs on for a minute
    mapped    asleep, with the lent memory still mapped
    exit      fails as it wakes, and ends
    hang      never gets done with waking; the file is taken away, so that the next one does

On a GPU it computes with torch, by a captured CUDA graph; on the host's memory it hashes the weights. `/health` answers 503 while it is
asleep.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from gpumem.client import Client, Region
from gpumem.hardware.memory import HOST
from restore_agent.workload.control_directory import ControlDirectory
from tests.worlds.checkpoints import SIZES, Size
from tests.worlds.json_answers import json_server

CYCLES = 2_000_000_000  # of a GPU's clock in a second, about
BUSY_SECONDS = 60


class Model(Protocol):
    def answer(self) -> str: ...
    def busy(self, seconds: int) -> None:
        """Gives the device work for so long, and returns at once."""

    def make_small(self) -> None: ...


class OnHost:
    def __init__(self, lent: Region) -> None:
        self._lent = lent

    def answer(self) -> str:
        return hashlib.sha256(self._lent.view()).hexdigest()

    def busy(self, seconds: int) -> None:
        """The host's memory has no work of its own."""

    def make_small(self) -> None:
        gc.collect()


class OnGpu:
    def __init__(self, lent: Region, device: str, size: Size) -> None:
        import torch  # noqa: PLC0415  (only where there is a GPU)

        from gpumem.client.torch import adopt, skeleton, torch_device  # noqa: PLC0415
        from tests.worlds import torch_model as models  # noqa: PLC0415

        self._torch: Any = torch
        torch.cuda.set_device(torch_device(device))
        with skeleton():
            model = models.Model(size)
        adopt(model, lent)
        self._graph = models.Graph(model)

    def answer(self) -> str:
        return hashlib.sha256(self._graph.run([3, 1, 4, 1]).numpy().tobytes()).hexdigest()

    def busy(self, seconds: int) -> None:
        self._torch.cuda._sleep(seconds * CYCLES)

    def make_small(self) -> None:
        self._torch.cuda.synchronize()
        gc.collect()
        self._torch.cuda.empty_cache()


class Sleep:
    """What the server does when it is told to sleep, and to wake."""

    def __init__(self, client: Client, model: Model, fault: Path, working: threading.Lock) -> None:
        self._client = client
        self._model = model
        self._fault = fault
        self._working = working
        self.awake = False

    def quiesce(self) -> None:
        if self.awake:
            self._working.acquire()
        self.awake = False
        self._model.make_small()
        fault = self._told()
        if fault == "mapped":
            self._client._connection.close()  # a connection would fail the dump, before what is meant here does
            return
        self._client.quiesce()
        if fault == "busy":
            self._model.busy(BUSY_SECONDS)

    def resume(self, moved: Mapping[str, str]) -> None:
        fault = self._told()
        if fault == "exit":
            raise RuntimeError("told to fail as it wakes")
        if fault == "hang":
            self._fault.unlink()
            threading.Event().wait()
        self._client.resume(moved=moved)
        self.awake = True
        self._working.release()

    def _told(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._fault.read_text().strip()
        return ""


def main() -> None:
    port, working = int(sys.argv[1]), threading.Lock()
    client = Client(label="faulty server")
    lent = client.attach(bytes.fromhex(os.environ["GPUMEM_REGION"]), wait=60)
    model: Model = OnHost(lent) if client.device == HOST else OnGpu(lent, client.device, SIZES[sys.argv[2]])
    model.answer()
    sleep = Sleep(client, model, Path(os.environ.get("FAULT", os.devnull)), working)

    def answer(path: str) -> tuple[HTTPStatus, object]:
        if path == "/health":
            return HTTPStatus.OK if sleep.awake else HTTPStatus.SERVICE_UNAVAILABLE, {}
        if path.startswith("/busy/"):
            model.busy(int(path.rpartition("/")[2]))
            return HTTPStatus.OK, {}
        with working:
            began = time.monotonic()
            body: dict[str, object] = {"digest": model.answer()}
        if path == "/timed":
            body["seconds"] = time.monotonic() - began
        return HTTPStatus.OK, body

    server = json_server(port, answer)
    if control := ControlDirectory.from_environment():
        working.acquire()  # before anybody can ask
        control.start(sleep.quiesce, sleep.resume)
    else:
        sleep.awake = True
    server.serve_forever()


if __name__ == "__main__":
    main()
