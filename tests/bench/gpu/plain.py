"""The same server with its weights in the image, restored by stock CRIU and CUDA's checkpoint alone: what there is without gpumem and our
pages. It runs in our sandboxes, from the page cache, and is asked by the same canary."""

import asyncio
import contextlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from restore_agent.drivers.criu import Criu, Worker
from restore_agent.drivers.cuda import Cuda
from restore_agent.engine.canary import prove_canary, record_canary
from restore_agent.engine.engine import Engine
from restore_agent.places.output import Pipes
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.manifest import CanaryRecord, EngineRecord
from restore_agent.workload.control_directory import RESTORE_COMPLETE, SNAPSHOT_COMPLETE
from tests.bench.figures import Figure
from tests.bench.restore import nothing, spread

ROUNDS = 3


class Plain:
    """One engine, dumped with all that it holds."""

    def __init__(self, criu: Criu, cuda: Cuda, kdat: Path, work: Path, record: EngineRecord) -> None:
        self._criu, self._cuda, self._kdat, self._record = criu, cuda, kdat, record
        self._images = work / "plain"
        self._keys: tuple[str, str] = ("", "")
        self._gpu_pids: Sequence[int] = ()
        self._canary = CanaryRecord(path="/", answer="")
        self.bytes = 0

    async def dump(self, path: str) -> None:
        self._images.mkdir()
        async with await Sandbox.create(self._kdat) as sandbox:
            output = Pipes("plain")
            engine = await Engine.start(self._record, sandbox, output, for_snapshot=True)
            await engine.wait_healthy()
            await engine.wait_quiet()
            hosts = sandbox.host_pids()
            holders = self._cuda.holders(hosts.values())
            await self._cuda.suspend(holders)
            await self._criu.dump(sandbox, engine.pid, self._images, 600, nothing)
            await self._cuda.resume(holders)
            engine.tell(SNAPSHOT_COMPLETE)
            self._canary = await record_canary(engine, path, "")
            self._gpu_pids = [pid for pid, host in hosts.items() if host in holders]
            self._keys = output.keys
            output.close()
        self.bytes = sum(file.stat().st_size for file in self._images.iterdir())

    async def restore(self) -> tuple[float, float]:
        """Seconds from nothing to the answer, which must be the source's, and those of them that were CUDA's."""
        async with contextlib.AsyncExitStack() as stack:
            began = time.monotonic()
            sandbox = await stack.enter_async_context(await Sandbox.create(self._kdat))
            output = Pipes("plain")
            stack.callback(output.close)
            with output.writers() as fds:
                async with Worker.start(self._criu, sandbox, dict(zip(self._keys, fds, strict=True)), self._images) as worker:
                    pid = await worker.restore(nothing)
            hosts = sandbox.host_pids()
            cuda_seconds = sum(await self._cuda.resume([hosts[each] for each in self._gpu_pids]))
            engine = Engine(self._record, sandbox, output, pid)
            engine.tell(RESTORE_COMPLETE)
            await prove_canary(engine, self._canary)
            return time.monotonic() - began, cuda_seconds

    def remove(self) -> None:
        shutil.rmtree(self._images)


async def plain(criu: Criu, cuda: Cuda, kdat: Path, work: Path, command: Sequence[str], port: int, directory: Path) -> list[Figure]:
    record = EngineRecord(command=tuple(command), env={**os.environ, "GPUMEM_REGION": ""}, port=port, directory=str(directory))
    engine = Plain(criu, cuda, kdat, work, record)
    try:
        await engine.dump("/answer")
        taken = [await engine.restore() for _ in range(ROUNDS)]
    finally:
        await asyncio.to_thread(engine.remove)
    seconds = [whole for whole, _ in taken]
    cuda_part = statistics.median(part for _, part in taken)
    detail = f"{spread(seconds)}; CUDA {cuda_part:.2f}; image {engine.bytes / 1e9:.1f} GB in the page cache"
    return [Figure("plain CRIU + CUDA checkpoint, weights in the image", statistics.median(seconds), "s", detail=detail)]


if __name__ == "__main__":
    sys.exit("python -m tests.bench.gpu.resume runs this beside ours")
