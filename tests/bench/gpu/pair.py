"""Two GPUs: a replica wakes on the other one, by `python -m tests.bench.gpu.pair [qwen3-8b|small]`.

A snapshot is taken on GPU 0, where its weights are. Then GPU 0 is filled by somebody else, so the next restore lands on GPU 1: with its
weights brought there over NVLink by gpumem, and with weights that are there already. A standby that was demoted on one GPU wakes on the
other, and goes back. At last replicas spread over both until nothing fits. Every answer is compared with the first engine's. Seconds are
from the agent's call to the answer, without a gateway. Prints one table, writes `tests/bench/results/pair-GPU.json`. Needs root, CRIU and
torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from rich.console import Console
from zerowake_proto import agent_pb2 as pb

from restore_agent.drivers.cuda import Cuda
from restore_agent.sequences.placement import HEADROOM
from restore_agent.snapshots.catalog import Catalog
from tests.bench.figures import Figure, table
from tests.bench.gpu.results import keep
from tests.bench.restore import spread
from tests.worlds.agent import get
from tests.worlds.checkpoints import SIZES
from tests.worlds.device import check
from tests.worlds.node import MIB, NAME, SAME, Node

ROUNDS = 5
CASE_SECONDS = 90.0
console = Console(width=220)
Section = Callable[["Pair"], AsyncIterator[Figure]]


class Pair:
    """The node, and its two GPUs by UUID, as CUDA counts them."""

    def __init__(self, node: Node, gpus: tuple[str, ...]) -> None:
        assert node.cuda
        self.node = node
        self.cuda = node.cuda
        self.gpus = gpus
        self.names = {identity: f"GPU {number}" for number, identity in enumerate(gpus)}
        self.needed = max(Catalog(node.state).get("default", NAME).manifest.gpus.values()) + HEADROOM

    def hog(self, number: int, leave: int = 0) -> contextlib.AbstractContextManager[None]:
        """Takes what is free of a GPU, but for what is not enough for a replica, or for `leave` bytes."""
        return self.node.hog(leave or self.needed // 2, self.gpus[number])

    async def timed(self) -> tuple[float, pb.Replica, int, str]:
        """One restore: seconds to the right answer, the replica, the number of the GPU that it is on, its phases."""
        before, agent = self.cuda.free(), await self.node.agent()
        began = time.monotonic()
        answer = await agent.restore(NAME, cold=self.node.stand_in())
        got = await asyncio.to_thread(get, answer.replica, "/sum")
        seconds = time.monotonic() - began
        check(answer.fallback_detail == "", f"{answer.fallback_reason}: {answer.fallback_detail}")
        check(got == self.node.expected, f"it answers {got}, not {self.node.expected}")
        after = self.cuda.free()
        grown = [before[identity] - after[identity] for identity in self.gpus]
        check(max(grown) > 100 * MIB, f"a replica takes memory of a GPU: {[each >> 20 for each in grown]} MiB")
        phases = ", ".join(f"{phase.name} {phase.seconds * 1000:.0f}" for phase in answer.replica.phases if phase.seconds > 0.0005)
        return seconds, answer.replica, grown.index(max(grown)), phases

    async def weights_on(self) -> dict[str, int]:
        """Leases of the weights, by the GPU that they lie on."""
        return {
            self.names[region.device]: region.leases for region in (await self.node.status()).regions if region.device and region.sealed
        }

    async def rounds(
        self, name: str, prepare: Callable[[], Coroutine[Any, Any, None]], wanted: int, origin: int = pb.ORIGIN_RESTORED
    ) -> Figure:
        """Some restores that must land on a GPU, each after `prepare`."""
        times, phases = [], ""
        for _ in range(ROUNDS):
            await prepare()
            seconds, replica, number, phases = await self.timed()
            check(number == wanted, f"{name}: it woke on GPU {number}, not {wanted}")
            check(replica.origin == origin, f"{name}: it is {pb.Origin.Name(replica.origin)}")
            there = await self.weights_on()
            check(there.get(f"GPU {wanted}") == 1, f"{name}: it reads weights of its own GPU: {there}")
            times.append(seconds)
            await (await self.node.agent()).release(replica)
        return Figure(name, statistics.median(times), "s", detail=f"{spread(times)}; ms: {phases}")


async def nothing() -> None:
    pass


async def across(pair: Pair) -> AsyncIterator[Figure]:
    """Where it was; on the other GPU, with its weights brought there; and with weights that are there."""
    await (await pair.node.agent()).stage(NAME)
    yield await pair.rounds("staged, GPU 0, where it was", nothing, 0)
    with pair.hog(0):
        yield await pair.rounds("staged, GPU 0 → GPU 1, weights over NVLink", lambda: pair.node.evict(pair.gpus[1]), 1)
        yield await pair.rounds("staged, GPU 0 → GPU 1, weights there already", nothing, 1)


async def standby(pair: Pair) -> AsyncIterator[Figure]:
    """Demoted on one GPU, woken on the other, demoted there, woken on the first again: the same process all the while."""
    agent = await pair.node.agent()
    await agent.stage(NAME)
    _, replica, number, _ = await pair.timed()
    check(number == 0, f"with room on both it stays on GPU 0, not {number}")
    times: dict[int, list[float]] = {0: [], 1: []}
    phases = {0: "", 1: ""}
    try:
        for turn in range(2 * ROUNDS):
            target = 1 - turn % 2
            why = await agent.demote(replica)
            check(why == "", f"it is kept as a standby: {why}")
            with pair.hog(1 - target):
                seconds, replica, number, phases[target] = await pair.timed()
            check((number, replica.origin) == (target, pb.ORIGIN_STANDBY), f"turn {turn}: {pb.Origin.Name(replica.origin)} on GPU {number}")
            times[target].append(seconds)
    finally:
        for target, seconds_each in times.items():
            if seconds_each:
                name = f"standby demoted on GPU {1 - target}, woken on GPU {target}"
                yield Figure(name, statistics.median(seconds_each), "s", detail=f"{spread(seconds_each)}; ms: {phases[target]}")


async def replicas(pair: Pair) -> AsyncIterator[Figure]:
    """As many as fit, one after the other and then at once, over both GPUs. They are hogged so that few are enough."""
    agent = await pair.node.agent()
    await agent.stage(NAME)
    taken = pair.needed - HEADROOM
    with pair.hog(0, 2 * taken + 3 * HEADROOM), pair.hog(1, 3 * taken + 3 * HEADROOM):
        room = " and ".join(f"{size >> 20} MiB" for size in pair.cuda.free().values())
        fit = 0
        while True:
            answer = await agent.restore(NAME, cold=pair.node.stand_in())
            if answer.fallback_detail:
                break
            await pair.node.answers(answer.replica, pair.node.expected)
            fit += 1
            check(fit < 16, "they never end to fit")
        check(answer.fallback_reason == "no-gpu-memory", f"the last one: {answer.fallback_reason}: {answer.fallback_detail}")
        where = await pair.weights_on()
        yield Figure("replicas that fit", fit, "", at_least=4, detail=f"{room} free; {where}; the next: {answer.fallback_detail}")
        check(len(where) == 2 and all(where.values()), f"they are on both GPUs: {where}")
        await pair.node.zero()
        began = time.monotonic()
        answers = await asyncio.gather(*(agent.restore(NAME, cold=pair.node.stand_in()) for _ in range(fit)))
        for answer in answers:
            check(answer.fallback_detail == "", f"at once: {answer.fallback_reason}: {answer.fallback_detail}")
            await pair.node.answers(answer.replica, pair.node.expected)
        seconds = time.monotonic() - began
        yield Figure("as many at once, until the last one's answer", seconds, "s", detail=f"{await pair.weights_on()}")


async def main() -> int:
    size = sys.argv[1] if len(sys.argv) > 1 else "qwen3-8b"
    cuda = Cuda.find()
    gpus = cuda.gpus() if cuda else None
    if cuda is None or gpus is None or len(gpus.uuids) != 2:
        raise SystemExit(f"needs two NVIDIA GPUs, and {len(gpus.uuids) if gpus else 0} are here")
    figures: list[Figure] = []
    failures: list[str] = []
    before = cuda.used()
    with tempfile.TemporaryDirectory(prefix="zerowake-pair-", dir=os.environ.get("ZEROWAKE_GPU_WORK", "/var/tmp")) as folder:
        # Hardly more than the weights: what gpumem holds beside them it would give up, and more replicas would fit than were counted.
        pool = -(-SIZES[size].bytes // (2 * MIB)) * 2 * MIB + 64 * MIB
        began = time.monotonic()
        async with Node.started(Path(folder), gpus.uuids, pool, size) as node:
            manifest = Catalog(node.state).get("default", NAME).manifest
            console.print(
                f"snapshot after {time.monotonic() - began:.0f} s: {manifest.page_bytes >> 20} MiB of pages, GPU memory {manifest.gpus}"
            )
            for section in (across, standby, replicas):
                failure = await shown(section, Pair(node, gpus.uuids), figures)
                if failure:
                    failures.append(failure)
                    console.print(f"[red]{section.__name__} failed:[/] {failure}\n{node.logs()[-4000:]}", highlight=False)
                await put_back(node)
    left = cuda.used() - before
    figures.append(Figure("GPU memory left over", left / 1e6, "MB", at_most=SAME / 1e6, detail="both GPUs, after everything has ended"))
    console.print(table(figures))
    machine = {"gpus": gpus.names, "driver": gpus.driver}
    path = keep("pair-GPU", f"python -m tests.bench.gpu.pair {size}", machine, figures, failures=failures)
    console.print(f"kept in {path}")
    return 1 if failures or any(figure.met is False for figure in figures) else 0


async def shown(section: Section, pair: Pair, figures: list[Figure]) -> str:
    """Adds a section's figures as they come; returns how it failed, if it did."""
    try:
        async with asyncio.timeout(CASE_SECONDS):
            async for figure in section(pair):
                figures.append(figure)
                console.print(f"{figure.name}: {figure.value:.4g} {figure.unit}  {figure.detail}", highlight=False)
    except Exception as error:
        console.print(traceback.format_exc(limit=-3), highlight=False, markup=False)
        return f"{section.__name__}: {type(error).__name__}: {error}"
    return ""


async def put_back(node: Node) -> None:
    """For the next section: no replica; where the agent does not answer, another agent."""
    try:
        async with asyncio.timeout(20):
            await node.zero()
    except Exception:
        await node.stop()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
