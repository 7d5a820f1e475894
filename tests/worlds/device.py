"""A gpumem server of the test's own, processes that use it, and what the device says of its memory."""

import asyncio
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerowake_proto import gpumem_pb2 as pb

from gpumem.client.control import Control
from gpumem.hardware.devices import open_memory
from gpumem.hardware.memory import HOST, Memory
from gpumem.wire.errors import PeerGone
from tests.worlds.checkpoints import QWEN3_8B, SMALL, Size
from tests.worlds.waiting import blocking_until

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds, for whatever should take a few
SERVE = "from gpumem.programs.commands import main; main()"


class Failed(AssertionError):
    """What was measured is not right, so its figures mean nothing."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Failed(what)


@dataclass(frozen=True)
class Scale:
    pool: int  # bytes
    arena: int
    region: int
    weights: Size

    @staticmethod
    def of(memory: Memory) -> "Scale":
        """A GPU's pool is 100 GiB, or what a smaller card has beside the 16 GiB of its users; four regions of the weights must fit."""
        if memory.identity == HOST:
            return Scale(pool=512 << 20, arena=64 << 20, region=64 << 20, weights=SMALL)
        _, total = memory.free()
        return Scale(pool=min(100, (total >> 30) - 16) << 30, arena=20 << 30, region=16 << 30, weights=QWEN3_8B)


class Engine:
    """A process of tests/worlds/gpumem_engine.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def ask(self, order: str, seconds: float = PATIENCE, **arguments: Any) -> Any:
        """Raises Failed: it ended, or does not answer."""
        self.tell(order, **arguments)
        return self.answer(order, seconds)

    def tell(self, order: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([order, arguments]) + "\n")
            self._process.stdin.flush()

    def answer(self, order: str, seconds: float = PATIENCE) -> Any:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            check(bool(ready.select(seconds)), f"engine: no answer to {order!r} within {seconds:.0f} s")
        line = self._process.stdout.readline()
        check(bool(line), f"engine ended at {order!r}")
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self) -> int:
        return self._process.wait(PATIENCE)


class World:
    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.device = device
        self.memory: Memory = open_memory(device)
        self.scale = Scale.of(self.memory)
        self.socket = folder / "gpumem.sock"
        self._server: subprocess.Popen[bytes] | None = None
        self._log = (folder / "server.log").open("ab")

    @property
    def on_gpu(self) -> bool:
        return self.device != HOST

    def used(self) -> int:
        """Bytes of the device that are not free, as the system counts them."""
        free, total = self.memory.free()
        return total - free

    @contextmanager
    def server(self, devices: tuple[str, ...] = (), pool: int = 0, arena: int = -1) -> Iterator[dict[str, float]]:
        """Runs a server. Yields the seconds until it lends and until it fills."""
        sizes = [str(pool or self.scale.pool), str(self.scale.arena if arena < 0 else arena)]
        command = [sys.executable, "-c", SERVE, "serve", "--socket", str(self.socket), "--reserve", sizes[0], "--arena", sizes[1]]
        for device in devices or (self.device,):
            command += ["--device", device]
        begin = time.monotonic()
        seconds: dict[str, float] = {}
        with subprocess.Popen([*command, "--floor", "0"], stdout=self._log, stderr=self._log, cwd=ROOT) as self._server:
            try:
                self.until(self._lends, "the server lends")
                seconds["lends"] = time.monotonic() - begin
                self.until(lambda: all(device.filler_pid for device in self.status().devices), "the server fills")
                seconds["fills"] = time.monotonic() - begin
                yield seconds
            finally:
                self._server.terminate()
                self._server.wait(PATIENCE)

    def _lends(self) -> bool:
        assert self._server is not None
        check(self._server.poll() is None, f"the server ended: {(self.folder / 'server.log').read_text()[-2000:]}")
        try:
            self.status()
        except PeerGone:
            return False
        return True

    @contextmanager
    def engine(self, device: str = "") -> Iterator[Engine]:
        command = [sys.executable, "-m", "tests.worlds.gpumem_engine", str(self.socket), device or self.device]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, stderr=self._log, text=True, cwd=ROOT) as process:  # type: ignore[call-overload]
            engine = Engine(process)
            try:
                check(engine.answer("start") == "ready", "the engine is ready")
                yield engine
            finally:
                process.kill()

    def ask(self, what: Callable[[Control], Coroutine[Any, Any, Any]]) -> Any:
        async def asking() -> Any:
            async with Control.connected(self.socket, "tests") as control:
                return await what(control)

        return asyncio.run(asking())

    def status(self) -> pb.Status:
        found: pb.Status = self.ask(lambda control: control.status())
        return found

    def region(self, region_id: bytes) -> pb.RegionStatus | None:
        return next((found for found in self.status().regions if found.id == region_id and found.device), None)

    def evict(self, region_id: bytes, device: str = "") -> None:
        reference = pb.RegionRef(device=device or self.device, id=region_id)
        self.ask(lambda control: control.evict(reference))

    def free(self) -> int:
        """Bytes that the pool could lend now."""
        return int(self.status().devices[0].free_bytes)

    def kill_filler(self) -> None:
        pid = self.status().devices[0].filler_pid
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: self.status().devices[0].filler_pid not in (0, pid), "another filler")

    def until(self, holds: Callable[[], bool], what: str) -> float:
        """Waits for something; returns the seconds. Raises Failed."""
        try:
            return blocking_until(holds, what, PATIENCE)
        except AssertionError as error:
            raise Failed(str(error)) from None
