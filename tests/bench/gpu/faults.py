"""Faults on a GPU, at moments that a seed draws: `python -m tests.bench.gpu.faults [--faults N] [--seed S] [--seconds T]`.

A torch server, with weights that gpumem lends, is brought to a rung, and a call of the agent begins that leads to another. Somewhere in
that call the engine's processes or the agent are killed (kill -9), or somebody else takes all memory of the GPU that is free. After each
fault nothing may be left of what was begun, the GPU's memory by NVML is what it was, and the next restore answers as the engine did before
its snapshot. How long each call takes is measured before; a fault that was too late for its call is not counted.

Writes `tests/bench/results/faults-GPU.json`. Without a GPU it works on the host's memory, where nobody takes any, and keeps nothing. Needs
root, CRIU and torch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from zerowake_proto import agent_pb2 as pb

from gpumem.hardware.devices import devices
from gpumem.hardware.memory import HOST
from tests.bench.figures import Figure, table
from tests.bench.gpu.results import keep
from tests.worlds.device import check
from tests.worlds.node import MIB, NAME, SAME, Node
from tests.worlds.strike import engine_pids, kill

FAULTS = 100
SECONDS = 540.0
CASE_SECONDS = 90.0
VICTIMS = ("engine", "agent", "memory")
console = Console(width=220)
Call = Callable[[], Awaitable[Any]]


class Faults:
    """The node that they come to, and what was seen of each."""

    def __init__(self, node: Node, seed: int) -> None:
        self.node = node
        self.draw = random.Random(seed)
        self.took: dict[str, float] = {}  # seconds of each call when nothing comes between
        self.rows: list[dict[str, Any]] = []
        self.calls: dict[str, tuple[pb.Rung, Callable[[], Awaitable[Call]]]] = {
            "memory → serves": (pb.RUNG_MEMORY, self._restore),
            "standby → serves": (pb.RUNG_STANDBY, self._restore),
            "parked → serves": (pb.RUNG_PARKED, self._restore),
            "memory → standby": (pb.RUNG_MEMORY, lambda: self._stage(pb.RUNG_STANDBY)),
            "memory → parked": (pb.RUNG_MEMORY, lambda: self._stage(pb.RUNG_PARKED)),
            "standby → parked": (pb.RUNG_STANDBY, lambda: self._stage(pb.RUNG_PARKED)),
            "parked → standby": (pb.RUNG_PARKED, self._lower),
            "serves → standby": (pb.RUNG_MEMORY, lambda: self._demote(pb.RUNG_STANDBY)),
            "serves → parked": (pb.RUNG_MEMORY, lambda: self._demote(pb.RUNG_PARKED)),
        }

    async def measure(self) -> None:
        """Each call once as a rehearsal, and once for its time."""
        for _ in range(2):
            for name, (rung, prepared) in self.calls.items():
                async with self.node.unharmed():
                    await (await self.node.agent()).stage(NAME, rung)
                    call, began = await prepared(), time.monotonic()
                    await call()
                    self.took[name] = time.monotonic() - began

    async def one(self) -> None:
        """A fault, and a restore after it. Raises whatever shows that something is not as it was."""
        name = self.draw.choice(list(self.calls))
        victim = self.draw.choice(VICTIMS if self.node.cuda else VICTIMS[:2])
        moment = self.draw.random() * self.took[name]
        rung, prepared = self.calls[name]
        used = await asyncio.to_thread(self.node.used)
        async with self.node.unharmed():
            agent = await self.node.agent()
            await agent.stage(NAME, rung)
            call = await prepared()
            async with contextlib.AsyncExitStack() as taken:
                called = asyncio.ensure_future(call())
                await asyncio.wait([called], timeout=moment)
                struck = await self._strike(victim, called, taken)
                said = await _end(called)
            if victim == "agent" and struck:
                await agent.process.wait()
        replica = await self.node.restored()
        await (await self.node.agent()).release(replica)
        await self.node.zero()
        more = (await asyncio.to_thread(self.node.used) - used) / MIB
        if struck:
            self.rows.append({"call": name, "victim": victim, "after_ms": round(moment * 1000), "said": said, "more_mib": round(more, 1)})
            console.print(f"{len(self.rows):4d} {name}, {victim}, after {moment * 1000:.0f} ms: {said}", markup=False, soft_wrap=True)

    async def _strike(self, victim: str, called: asyncio.Future[Any], taken: contextlib.AsyncExitStack) -> bool:
        """Returns whether the call was still under way. An engine that has no process yet is waited for."""
        agent = await self.node.agent()
        while not called.done():
            if victim == "memory":
                await asyncio.to_thread(taken.enter_context, self.node.hog(leave=0))
                return True
            if pids := [agent.process.pid] if victim == "agent" else engine_pids(self.node, agent):
                kill(pids)
                return True
            await asyncio.sleep(0.001)  # as it shows from outside, in /proc alone
        return False

    async def _restore(self) -> Call:
        agent, cold = await self.node.agent(), self.node.stand_in()
        return lambda: agent.restore(NAME, cold=cold)

    async def _stage(self, rung: pb.Rung) -> Call:
        agent = await self.node.agent()
        return lambda: agent.stage(NAME, rung)

    async def _lower(self) -> Call:
        agent = await self.node.agent()
        return lambda: agent.unstage(NAME, pb.RUNG_STANDBY)

    async def _demote(self, rung: pb.Rung) -> Call:
        agent, replica = await self.node.agent(), await self.node.restored()
        return lambda: agent.demote(replica, rung)

    def figures(self) -> list[Figure]:
        found = [Figure("faults after which all is what it was", len(self.rows), "")]
        for victim in VICTIMS:
            of = [row for row in self.rows if row["victim"] == victim]
            found.append(Figure(f"of them: {victim}", len(of), "", detail=f"{len({row['call'] for row in of})} calls"))
        least, most = (f([row["more_mib"] for row in self.rows], default=0.0) for f in (min, max))
        found.append(
            Figure("GPU memory after a fault, less that before it", most, "MiB", at_most=SAME / MIB, detail=f"the least {least:g}")
        )
        return found


async def _end(called: asyncio.Future[Any]) -> str:
    """What the caller is told."""
    try:
        answer = await called
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    if isinstance(answer, pb.RestoreResponse):
        return f"{pb.Origin.Name(answer.replica.origin)} {answer.fallback_detail}".strip()
    if isinstance(answer, pb.StageResponse | pb.UnstageResponse):
        return pb.Rung.Name(answer.residency.rung)
    return str(answer).strip() or "done"


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu.faults")
    parser.add_argument("--faults", type=int, default=FAULTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    device = devices()[0]
    with tempfile.TemporaryDirectory(prefix="zw-", dir=os.environ.get("ZEROWAKE_GPU_WORK")) as folder:
        async with Node.started(Path(folder), (device,), (256 if device == HOST else 3072) * MIB) as node:
            faults, failed = Faults(node, asked.seed), ""
            try:
                await faults.measure()
                console.print(", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in faults.took.items()))
                while len(faults.rows) < asked.faults and time.monotonic() < until:
                    async with asyncio.timeout(CASE_SECONDS):
                        await faults.one()
            except Exception:
                failed = traceback.format_exc()
                console.print(node.logs(), failed, markup=False)
            machine = {"gpus": node.cuda.gpus().names, "driver": node.cuda.gpus().driver} if node.cuda else None
    console.print(table(faults.figures()))
    if machine:
        more = {"took": faults.took, "faults": faults.rows, "failed": failed}
        command = f"python -m tests.bench.gpu.faults --faults {asked.faults} --seed {asked.seed}"
        path = keep("faults-GPU", command, machine, faults.figures(), **more)
        if out := os.environ.get("OUT"):
            (Path(out) / path.name).write_bytes(path.read_bytes())
    check(not failed, "nothing is left after each fault")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
