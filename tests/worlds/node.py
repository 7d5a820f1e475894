"""A node of the test's own: gpumem, an agent that is started again when it was killed, a snapshot, and a look at what is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import yaml
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import gpumem_pb2

from gpumem.client.control import Control
from gpumem.hardware.devices import open_memory
from gpumem.hardware.memory import DeviceFull
from gpumem.wire.blocking_connection import BlockingConnection
from restore_agent.drivers.cuda import Cuda
from restore_agent.snapshots.catalog import Catalog
from tests.worlds.agent import PORT, Agent, get, running
from tests.worlds.checkpoints import SIZES, write_checkpoint
from tests.worlds.device import ROOT, Failed, World, check
from tests.worlds.leftovers import left_behind
from tests.worlds.ports import free_port
from tests.worlds.processes import descriptors

NAME = "faulty"
MIB = 1 << 20
SAME = 64 * MIB  # bytes of GPU memory by which two looks at an unchanged GPU may differ
ARENA = 1 << 30  # bytes of host memory that a GPU is filled through
PATIENCE = 20.0  # seconds until what has ended is gone
_PASSED_ON = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "NCCL_NVLS_ENABLE")


class Node:
    """Use `async with Node.started(folder, device)`."""

    def __init__(self, folder: Path, device: str, size: str = "small") -> None:
        self.world = World(folder, device)
        self.size = size
        self.state = folder / "state"
        self.weights = folder / "weights"
        self.fault = folder / "shared" / "fault"
        self.expected: Any = None  # what the engine of the snapshot answered before it
        self.cuda = Cuda.find() if self.world.on_gpu else None
        self._agent: Agent | None = None
        self._heard: dict[str, pb.Replica] = {}  # the last that the agent said of each
        self._running = contextlib.AsyncExitStack()

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, folder: Path, devices: tuple[str, ...], pool: int, size: str = "small") -> AsyncIterator[Node]:
        """With the snapshot NAME of tests/worlds/faulty_engine.py, taken on the first of the devices; gpumem holds `pool` bytes of each."""
        node = cls(folder, devices[0], size)
        node.fault.parent.mkdir()
        await asyncio.to_thread(write_checkpoint, node.weights, SIZES[size])
        serving = contextlib.ExitStack()
        await asyncio.gather(asyncio.to_thread(serving.enter_context, node.world.server(devices, pool, ARENA)), node._read_once())
        try:
            try:
                await node.capture(NAME)
            except BaseException:
                print(node.logs())
                raise
            canary = Catalog(node.state).get("default", NAME).manifest.canary
            assert canary is not None
            node.expected = json.loads(canary.answer)
            yield node
        finally:
            await node.stop()
            await asyncio.to_thread(serving.close)

    async def _read_once(self) -> None:
        """Libraries into page cache, so that the engine's time to be ready is not the disk's."""
        if self.world.on_gpu:
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import torch; torch.cuda.init()")
            check(await process.wait() == 0, "torch can be imported")

    async def agent(self) -> Agent:
        """The one that runs, or another."""
        if self._agent is None or self._agent.process.returncode is not None:
            await self.stop()
            self._agent = await self._running.enter_async_context(running(self.state, "--gpumem", str(self.world.socket)))
            listening = asyncio.create_task(self._listen(self._agent))
            self._running.push_async_callback(asyncio.wait, [listening])
            self._running.callback(listening.cancel)
        return self._agent

    async def stop(self) -> None:
        agent, self._agent = self._agent, None
        try:
            await self._running.aclose()
        except TimeoutError:
            assert agent
            agent.kill()
            await agent.process.wait()
            raise Failed("the agent did not end when it was told to") from None

    async def capture(self, name: str) -> pb.SnapshotResult:
        agent = await self.agent()
        return await agent.snapshot(name, self.engine(), weights=str(self.weights))

    def engine(self) -> pb.Engine:
        env = {key: os.environ[key] for key in _PASSED_ON if key in os.environ} | {"FAULT": str(self.fault)}
        command = [sys.executable, "-m", "tests.worlds.faulty_engine", str(PORT), self.size]
        seconds = 20 if self.world.on_gpu else 8  # the host's memory needs no CUDA to start
        ready = {"health_path": "/health", "ready_timeout_seconds": seconds}
        return pb.Engine(command=command, env=env, directory=str(ROOT), port=PORT, shared=[str(self.fault.parent)], **ready)

    def stand_in(self) -> pb.Engine:
        """What is started cold: at once, and it says so."""
        command = [sys.executable, "-m", "tests.worlds.cold_engine", str(PORT)]
        env = {"PATH": os.environ["PATH"]}
        return pb.Engine(command=command, env=env, directory=str(ROOT), port=PORT, health_path="/health", ready_timeout_seconds=20)

    async def restored(self) -> pb.Replica:
        """A replica that was restored, and answers as the engine did before its snapshot."""
        answer = await (await self.agent()).restore(NAME)
        check(answer.fallback_detail == "", f"restored, not {answer.fallback_reason}: {answer.fallback_detail}")
        await self.answers(answer.replica, self.expected)
        return answer.replica

    async def answers(self, replica: pb.Replica, expected: Any) -> None:
        got = await asyncio.to_thread(get, replica, "/sum")
        check(got == expected, f"{replica.id} answers {got}, not {expected}")

    async def live(self) -> list[str]:
        """Ids of the replicas that the agent has."""
        return sorted(await (await self.agent()).live_replicas())

    async def gone(self, replica: pb.Replica) -> str:
        """Waits until the agent has said that the replica ended; returns why."""
        async with asyncio.timeout(60):
            while self._heard.get(replica.id, replica).state != pb.REPLICA_GONE:  # the answer may be here before the news
                await asyncio.sleep(0.02)
        return self._heard[replica.id].detail

    async def _listen(self, agent: Agent) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):  # it was killed
            async for update in agent.stub.Watch(pb.WatchRequest()):
                if update.HasField("replica"):
                    self._heard[update.replica.id] = update.replica

    async def zero(self) -> None:
        """No replica, no standby; where no agent runs, nothing."""
        if self._agent is None or self._agent.process.returncode is not None:
            return
        for replica_id in await self.live():
            await self._agent.release(pb.Replica(id=replica_id))
        await self._agent.unstage(NAME, pb.RUNG_MEMORY)

    # Memory

    def used(self) -> int:
        """Bytes of GPU memory; without a GPU, of what gpumem lends."""
        if self.cuda:
            return self.cuda.used()
        return sum(device.regions_bytes + device.scratch_bytes for device in self.world.status().devices)

    async def status(self) -> gpumem_pb2.Status:
        found: gpumem_pb2.Status = await self.control(lambda control: control.status())
        return found

    async def control(self, ask: Callable[[Control], Any]) -> Any:
        async with Control.connected(self.world.socket, "tests") as control:
            return await ask(control)

    async def evict(self, device: str = "") -> None:
        """The weights off a device, or off all."""
        for region in (await self.status()).regions:
            if device in ("", region.device):
                place = gpumem_pb2.RegionRef(device=region.device, id=region.id)
                await self.control(partial(Control.evict, region=place))

    @contextlib.asynccontextmanager
    async def pool_held(self) -> AsyncIterator[None]:
        """Another client has all that the pool could lend. It needs no context: it maps nothing."""
        connection = BlockingConnection(self.world.socket, "a client that takes all")
        try:
            while (pool := (await self.status()).devices[0]).free_bytes or pool.owed_bytes:
                if pool.free_bytes:
                    scratch = gpumem_pb2.Scratch(device=self.world.device, size=pool.free_bytes)
                    (await asyncio.to_thread(connection.ask, gpumem_pb2.Request(scratch=scratch)))[1].close()
                else:
                    await asyncio.sleep(0.02)  # what was given back is not free at once
            yield
        finally:
            connection.close()

    @contextlib.contextmanager
    def hog(self, leave: int, device: str = "") -> Iterator[None]:
        """Takes a GPU's memory, but for about so many bytes."""
        memory, taken, size = open_memory(device or self.world.device), list[int](), 0
        try:
            for piece in (1 << 30, 64 * MIB):
                with contextlib.suppress(DeviceFull):
                    while memory.free()[0] - piece > leave:
                        taken.append(memory.create(piece))
                        size += piece
            yield
        finally:
            free, began = memory.free()[0], time.monotonic()
            for fd in taken:
                os.close(fd)
            while memory.free()[0] < free + size - SAME and time.monotonic() - began < 2:
                time.sleep(0.005)  # it is not free at once

    # What is left

    @contextlib.asynccontextmanager
    async def unharmed(self) -> AsyncIterator[None]:
        """Nothing runs before; afterwards nothing does, and the memory is as it was. Raises Failed, saying what is not."""
        await self.zero()
        await self._until(self._left, "before the case")
        before = await asyncio.to_thread(self.used)
        yield
        await self.zero()

        async def left() -> str:
            more = await asyncio.to_thread(self.used) - before
            return await self._left() or (f"{more / MIB:.0f} MiB of memory are still used" if more > SAME else "")

        seconds = await self._until(left, "after the case")
        print(f"  everything is back after {seconds:.2f} s, {(await asyncio.to_thread(self.used) - before) / MIB:+.0f} MiB")

    async def _until(self, left: Callable[[], Any], when: str) -> float:
        began = time.monotonic()
        while what := await left():
            check(time.monotonic() - began < PATIENCE, f"{when}, {PATIENCE:.0f} s later: {what}")
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def _left(self) -> str:
        found = left_behind(self.state, but_ready=True)
        if self._agent is not None and self._agent.process.returncode is None:
            held = [link for link in descriptors(self._agent.process.pid) if link.startswith(("pid:[", "net:[", "mnt:["))]
            found += [f"the agent holds {link}" for link in held]
        status = await self.status()
        found += [f"gpumem lends {lease.size} bytes to {lease.label} (pid {lease.pid})" for lease in status.leases]
        found += [f"gpumem fills {fill.region.hex()[:12]}" for fill in status.fills]
        return "; ".join(found)

    # The gateway

    @contextlib.asynccontextmanager
    async def gateway(self, **declared: object) -> AsyncIterator[Callable[[], Any]]:
        """`zerowake up` in the agent's place. Yields what asks it for an answer: (status, body, seconds). `declared`: of the model."""
        await self.stop()
        file, port = self.state.parent / "up.yaml", free_port()
        model = {"snapshot": NAME, "cooldown_seconds": 60, "polling_seconds": 0.2, **declared}
        file.write_text(yaml.safe_dump({"state": str(self.state), "listen": f"127.0.0.1:{port}", "models": {NAME: model}}))

        async def ask() -> tuple[int, str, float]:
            began = time.monotonic()
            url = f"http://127.0.0.1:{port}/models/{NAME}/sum"
            async with asyncio.timeout(90), aiohttp.ClientSession() as session, session.get(url) as response:
                return response.status, await response.text(), time.monotonic() - began

        with (self.state.parent / "up.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "scaler.programs.cli", "up", str(file)),
                env=os.environ | {"GPUMEM_SOCKET": str(self.world.socket)},
                stdout=log,
                stderr=log,
            )
        try:
            async with asyncio.timeout(30):
                while not await _listens(port):
                    check(process.returncode is None, f"zerowake up ended: {(self.state.parent / 'up.log').read_text()[-3000:]}")
                    await asyncio.sleep(0.05)
            yield ask
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()

    def logs(self) -> str:
        """The end of what was logged, for a case that failed."""
        found = [self.state.parent / name for name in ("agent.log", "up.log", "server.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in found if path.exists())


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
