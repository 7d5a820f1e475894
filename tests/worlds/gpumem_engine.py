"""A process that uses gpumem as an engine does: it takes orders as JSON lines and answers each with one.

On a GPU it computes with torch; on the host's memory with numpy.
"""

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from gpumem.checkpoint.safetensors import read_checkpoint
from gpumem.client import Client, Region, Scratch
from gpumem.hardware.devices import open_memory
from gpumem.hardware.memory import HOST
from tests.worlds.checkpoints import Size

GIB = 1 << 30


class Engine:
    def __init__(self, socket: str, device: str) -> None:
        self.device = device
        self.client = Client(socket, device=device, label="engine")
        self.lent: Region | Scratch
        self._model: Any = None
        if device != HOST:
            import torch  # noqa: PLC0415  (only where there is a GPU)

            from gpumem.client.torch import bytes_at, torch_device  # noqa: PLC0415

            self._bytes_at = bytes_at
            torch.cuda.set_device(torch_device(device))
            warm = torch.arange(1 << 20, device="cuda")  # a serving engine has its context and has run kernels
            int(warm.view(torch.uint8)[:4096].view(torch.int64)[-1:].sum()), int(warm.sum())

    def numbers(self) -> Any:
        """What is lent, as 64-bit integers."""
        size = self.lent.size // 8 * 8
        if self.device == HOST:
            return np.frombuffer(self.lent.view(), dtype=np.int64, count=size // 8)
        import torch  # noqa: PLC0415

        return self._bytes_at(self.lent.address, self.lent.size, self.device)[:size].view(torch.int64)

    def attach(self, region: str, capability: str = "", wait: float = 0.0) -> dict[str, Any]:
        """Also runs one kernel on the last byte, to the end."""
        begin = time.perf_counter()
        self.lent = self.client.attach(bytes.fromhex(region), bytes.fromhex(capability), wait)
        attached = time.perf_counter()
        last = int(self.numbers()[-1:].sum())
        return {"attach": attached - begin, "first": time.perf_counter() - begin, "last": last}

    def sum(self) -> int:
        return int(self.numbers().sum())

    def hashes(self, sizes: list[int]) -> list[str]:
        """BLAKE3 of what is lent, in pieces of these sizes one behind the other."""
        if self.device == HOST:
            lent = self.lent.view()
            pieces = (lent[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True))
        else:
            there = self._bytes_at(self.lent.address, self.lent.size, self.device)
            pieces = (memoryview(piece.cpu().numpy()) for piece in there[: sum(sizes)].split(sizes))
        return [blake3(piece).hexdigest() for piece in pieces]

    def begin(self, region: str, size: int, part: float) -> dict[str, Any]:
        """Becomes the writer of a region and writes a part of it."""
        from zerowake_proto import gpumem_pb2  # noqa: PLC0415

        region_ = self.client.begin(bytes.fromhex(region), gpumem_pb2.Layout(size=size))
        self.lent = region_
        numbers = self.numbers()
        some = int(len(numbers) * part)
        if self.device == HOST:
            numbers[:some] = np.random.default_rng(7).integers(-(1 << 62), 1 << 62, some)
        else:
            import torch  # noqa: PLC0415

            numbers[:some].random_()
            torch.cuda.synchronize()
        return {"capability": region_.capability.hex()}

    def seal(self) -> int:
        assert isinstance(self.lent, Region)
        self.lent.seal()
        return self.sum()

    def scratch(self, size: int) -> int:
        """The sum of what is found in new scratch memory, which is then written full."""
        self.lent = self.client.scratch(size)
        found = self.sum()
        self.numbers()[:] = -1
        return found

    def harm(self) -> None:
        """Writes to what it may only read."""
        if self.device == HOST:
            import ctypes  # noqa: PLC0415

            ctypes.memset(self.lent.address, 1, 1)
        self.numbers()[:1] = 1
        self.sum()

    def quiesce(self) -> float:
        begin = time.perf_counter()
        self.client.quiesce()
        return time.perf_counter() - begin

    def resume(self) -> float:
        begin = time.perf_counter()
        self.client.resume()
        return time.perf_counter() - begin

    def fill(self, directory: str) -> str:
        checkpoint = read_checkpoint(Path(directory))
        return str(self.client.fill(checkpoint.layout, checkpoint.parts).id.hex())

    # With torch

    def model(self, size: list[int]) -> dict[str, float]:
        """A model on the lent region, captured as a CUDA graph."""
        from gpumem.client.torch import adopt, skeleton  # noqa: PLC0415
        from tests.worlds.torch_model import Graph, Model  # noqa: PLC0415

        begin = time.perf_counter()
        with skeleton():
            made = Model(Size(*size))
        built = time.perf_counter()
        assert isinstance(self.lent, Region)
        adopt(made, self.lent)
        adopted = time.perf_counter()
        self._model = Graph(made)
        return {"skeleton": built - begin, "adopt": adopted - built, "capture": time.perf_counter() - adopted}

    def run(self) -> dict[str, Any]:
        begin = time.perf_counter()
        logits = self._model.run([3, 1, 4, 1])
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "finite": bool(logits.isfinite().all()), "digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest()}

    def publish(self, size: list[int], region: str) -> bool:
        """Writes a model made here into a region; whether it then answers as before."""
        import torch  # noqa: PLC0415

        from gpumem.client import torch as adapter  # noqa: PLC0415
        from tests.worlds.torch_model import Model  # noqa: PLC0415

        model = Model(Size(*size)).cuda()
        tokens = torch.tensor([3, 1, 4, 1], device="cuda")
        with torch.no_grad():
            before = model(tokens)
            made = self.client.begin(bytes.fromhex(region), adapter.layout_of(model))
            adapter.fill(model, made)
            made.seal()
            self.lent = made
            inside = all(made.address <= parameter.data_ptr() < made.address + made.size for parameter in model.parameters())
            return bool(torch.equal(before, model(tokens))) and inside

    def load(self, directory: str, library: str) -> float:
        """Seconds in which another library brings a checkpoint onto the GPU."""
        import torch  # noqa: PLC0415

        files = [str(path) for path in sorted(Path(directory).glob("*.safetensors"))]
        begin = time.perf_counter()
        if library == "safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415

            loaded = [load_file(path, device="cpu") for path in files]
            there = [{name: tensor.cuda() for name, tensor in state.items()} for state in loaded]
        elif library == "safetensors on the GPU":
            from safetensors.torch import load_file  # noqa: PLC0415

            there = [load_file(path, device="cuda") for path in files]
        else:
            from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # noqa: PLC0415

            loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cuda:0"), nogds=True)
            loader.add_filenames({0: files})
            buffer = loader.copy_files_to_device()
            there = [{name: buffer.get_tensor(name) for name in loader.get_keys()}]
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        assert sum(len(state) for state in there) > 0
        return seconds

    def pinned_rate(self, size: int) -> list[float]:
        """Bytes a second from pinned host memory to this device, in copies of 64 MiB, one time after the other."""
        import torch  # noqa: PLC0415

        source = torch.ones(size, dtype=torch.uint8, pin_memory=True)
        memory = open_memory(self.device)
        target = torch.empty(size, dtype=torch.uint8, device="cuda")
        rates = []
        for _ in range(4):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for at in range(0, size, 64 << 20):
                memory.copy_from_host(target.data_ptr() + at, source.data_ptr() + at, min(64 << 20, size - at), 0)
            memory.synchronize(0)
            rates.append(size / (time.perf_counter() - begin))
        return rates

    def peer_rate(self, size: int) -> list[float]:
        """Bytes a second from the other GPU to this one, by torch, one time after the other."""
        import torch  # noqa: PLC0415

        other = 1 - torch.cuda.current_device()
        source = torch.ones(size, dtype=torch.uint8, device=f"cuda:{other}")
        target = torch.empty(size, dtype=torch.uint8, device="cuda")
        rates = []
        for _ in range(4):
            torch.cuda.synchronize(other)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize(other)
            torch.cuda.synchronize()
            rates.append(size / (time.perf_counter() - begin))
        return rates


def main() -> None:
    engine = Engine(*sys.argv[1:])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order, arguments = json.loads(line)
        handler: Callable[..., Any] = getattr(engine, order)
        print(json.dumps(handler(**arguments)), flush=True)


if __name__ == "__main__":
    main()
