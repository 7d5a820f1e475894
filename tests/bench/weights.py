"""The embeddings engine's weights in a gpumem region, beside weights mapped from their file: image, memory of eight replicas, restores."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path

from gpumem.hardware.memory import HOST
from restore_agent.engine.canary import prove_canary, record_canary
from restore_agent.engine.engine import Engine
from restore_agent.pages.fill import Arena
from restore_agent.pages.images import split
from restore_agent.places.output import Pipes
from restore_agent.places.sandbox import Sandbox
from restore_agent.snapshots.chunks import ChunkStore, Lease, write_chunks
from restore_agent.snapshots.manifest import EngineRecord
from restore_agent.snapshots.page_runs import write_index
from restore_agent.workload.control_directory import SNAPSHOT_COMPLETE
from tests.bench.figures import Figure
from tests.bench.restore import DEMO, PORT, Bench, Dumped, at_once, nothing, prepared, spread
from tests.worlds.device import World

ROUNDS = 7
REPLICAS = 8
BODY = json.dumps({"model": "all-minilm-l6-v2", "input": "From nothing to an answer."})


async def main() -> list[Figure]:
    async with prepared() as bench:
        return await _measure(bench)


async def _measure(bench: Bench) -> list[Figure]:
    world = World(bench.work, HOST)
    ways = {"in a file": {}, "in gpumem": {"GPUMEM_SOCKET": str(world.socket)}}
    figures = []
    with contextlib.ExitStack() as stack:
        await asyncio.to_thread(stack.enter_context, world.server(pool=256 << 20, arena=0))
        dumped = {way: await _dump(bench, way.replace(" ", "-"), env) for way, env in ways.items()}
        if len({each.canary.model_dump_json() for each in dumped.values()}) != 1:
            raise AssertionError("the engine answers differently with its weights in gpumem")
        seconds: dict[tuple[str, int], list[float]] = {(way, count): [] for way in ways for count in (1, REPLICAS)}
        for _ in range(ROUNDS + 1):
            for (way, count), into in seconds.items():
                into.append(await at_once(bench, dumped[way], bench.ours, count))  # each answer is compared with the first engine's
        for way in ways:
            memory = await _memory(bench, dumped[way])
            figures += [
                Figure(f"weights {way}: image", dumped[way].arena.size / 1e6, "MB", detail="pages; 91 MB of weights are in neither"),
                Figure(f"weights {way}: memory of {REPLICAS} replicas", memory / 1e6, "MB", detail="proportional set size, answered once"),
            ]
            for count in (1, REPLICAS):
                taken = seconds[way, count][1:]
                name = f"weights {way}: {count} restored, last first answer"
                figures.append(Figure(name, statistics.median(taken), "s", detail=f"{spread(taken)}, in turn; same answer every time"))
    return figures


async def _dump(bench: Bench, name: str, env: dict[str, str]) -> Dumped:
    """As Bench.dump, for an engine that may sleep from before it listens until the dump is done."""
    command = (sys.executable, str(DEMO / "embeddings.py"), "--port", str(PORT))
    record = EngineRecord(command=command, env={"PATH": os.environ["PATH"]} | env, directory=str(DEMO), port=PORT)
    images = bench.work / name / "images"
    images.mkdir(parents=True)
    async with await Sandbox.create(bench.kdat) as sandbox:
        output = Pipes(name)
        engine = await Engine.start(record, sandbox, output, for_snapshot=True)
        await engine.wait_healthy(or_ready=True)
        await engine.wait_quiet()
        await bench.criu.dump(sandbox, engine.pid, images, 600, nothing)
        engine.tell(SNAPSHOT_COMPLETE)
        await engine.wait_healthy()
        canary = await record_canary(engine, "/v1/embeddings", BODY)
        output.close()
    store = ChunkStore(bench.work / name / "chunks")
    chunks, index = await asyncio.to_thread(write_chunks, Lease(store), split(images))
    write_index(images / "pages.index", index)
    arena = await Arena.load(store, chunks, (images / "pages.index").read_bytes())
    return Dumped(record, output.keys, images, images, arena, canary)


async def _memory(bench: Bench, dumped: Dumped) -> int:
    """Bytes of all replicas together: what they share counts once."""
    async with contextlib.AsyncExitStack() as stack:
        total = 0
        engines = [await bench.ours(dumped, stack) for _ in range(REPLICAS)]
        for engine in engines:
            await prove_canary(engine, dumped.canary)
        for engine in engines:
            for pid in engine.place.host_pids().values():
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += next(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
        return total
