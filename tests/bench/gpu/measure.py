"""Everything that gpumem promises, shown on this machine: `python -m tests.bench.gpu.measure`.

One table, and with a GPU `tests/bench/results/gpumem-GPU.json`. Without one, the same on the host's memory and smaller (that is a test).
What needs torch, CUDA's checkpoint, or two GPUs is left out where these are missing.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from zerowake_proto import gpumem_pb2 as pb

from gpumem.checkpoint.safetensors import Checkpoint, read_checkpoint
from gpumem.hardware.devices import devices
from gpumem.hardware.memory import HOST
from tests.bench.figures import Figure, table
from tests.bench.gpu.results import keep
from tests.worlds.checkpoints import SMALL, write_checkpoint
from tests.worlds.device import Engine, Failed, World, check

READERS = 4
ROUNDS = 3


def lending(world: World) -> Iterator[Figure]:
    """What is lent: written once, read by many, harmed by nobody, gone with its owner."""
    size = world.scale.region
    gib = size / (1 << 30)
    before = world.used()
    with world.server(arena=0) as up:
        held = world.used() - before
        yield Figure(
            "pool up", up["lends"], "s", at_most=5, detail=f"{world.scale.pool >> 20} MiB held before anybody asks, in a new process"
        )
        if world.on_gpu:
            check(held >= world.scale.pool, f"{held} bytes are held, of {world.scale.pool}")
        region = os.urandom(32)
        with world.engine() as writer:
            capability = writer.ask("begin", region=region.hex(), size=size, part=1.0)["capability"]
            total = writer.ask("seal")
            if world.on_gpu:
                small = list(asdict(SMALL).values())
                check(writer.ask("publish", size=small, region=os.urandom(32).hex()), "a module moves into a region and answers the same")
        check(world.region(region) is not None, "a sealed region outlives its writer")
        name: dict[str, Any] = {"region": region.hex(), "capability": capability}

        yield from _writer_killed(world)
        yield from _readers(world, name, total, gib)
        with world.engine() as good, world.engine() as bad:
            good.ask("attach", **name)
            bad.ask("attach", **name)
            bad.tell("harm")
            check(bad.wait() != 0, "who writes to a sealed region ends")
            check(good.ask("sum") == total, "a reader's fault leaves the others' weights as they are")
            with world.engine() as late:
                late.ask("attach", **name)
                check(late.ask("sum") == total, "and is no hindrance to who comes later")
            world.kill_filler()
            check(good.ask("sum") == total, "nor is the filler's death")
        yield Figure("faults that reached another process", 0, "", at_most=0, detail="a reader that writes; the filler killed")
        with world.engine() as owner:
            check(owner.ask("scratch", size=size // 4) == 0, "scratch is zeros")
            owner.kill()
        with world.engine() as owner:
            check(owner.ask("scratch", size=world.free()) == 0, "and again for the next owner, wherever it lies")
        yield Figure("bytes of one owner's scratch that the next read", 0, "B", at_most=0, detail="all that the pool had was looked at")
    world.until(lambda: world.used() < before + world.scale.pool // 2, "the memory is back when the server has ended")


def _writer_killed(world: World) -> Iterator[Figure]:
    region = os.urandom(32)
    free = world.free()
    with world.engine() as writer:
        writer.ask("begin", region=region.hex(), size=world.scale.region, part=0.5)
        writer.kill()
    seconds = world.until(lambda: world.region(region) is None and world.free() >= free, "a killed writer's memory is free again")
    yield Figure(
        "a killed writer's memory back", seconds, "s", at_most=2, detail="killed by SIGKILL at half; the region is gone, its memory new"
    )


def _readers(world: World, name: dict[str, Any], total: int, gib: float) -> Iterator[Figure]:
    """Several at a time, each killed in the end: the region needs none of them."""
    times, attached, grown, engines = [], [], [], []
    for _ in range(READERS):
        before = world.used()
        engine = world.engine()
        engines.append((engine, engine.__enter__()))
        context = world.used()
        seconds = engines[-1][1].ask("attach", **name)
        times.append(seconds["first"] * 1e3)
        attached.append(seconds["attach"] * 1e3)
        grown.append((context - before, world.used() - context))
        check(engines[-1][1].ask("sum") == total, "a reader sees what was written")
    for engine, running in engines:
        running.kill()
        engine.__exit__(None, None, None)
    detail = f"{READERS} engines, " + ", ".join(f"{one:.1f}" for one in times) + f"; the attach alone {median(attached):.1f}"
    yield Figure(f"attach and first kernel, {gib:.3g} GiB", median(times), "ms", at_most=20, detail=detail)
    if world.on_gpu:
        shared = max(added for _, added in grown) / (1 << 20)
        contexts = median(context for context, _ in grown) / (1 << 20)
        detail = f"{READERS} readers, by NVML; each process has its own context besides: {contexts:.0f} MiB"
        yield Figure(f"memory that a reader adds for {gib:.3g} GiB", shared, "MiB", at_most=64, detail=detail)
    with world.engine() as again:
        first = again.ask("attach", **name)["first"]
        check(again.ask("sum") == total, "the region outlives every engine")
        yield Figure("attach after all engines were killed", first * 1e3, "ms", at_most=20)


def filling(world: World, weights: Path) -> Iterator[Figure]:
    """A checkpoint's way onto the device, from the disk, from page cache, from the arena."""
    begin = time.perf_counter()
    checkpoint = read_checkpoint(weights)
    size = checkpoint.layout.size
    yield Figure(
        "import", size / (time.perf_counter() - begin) / 1e9, "GB/s", detail=f"{size / 1e9:.3g} GB hashed, files in page cache; once"
    )
    pinned = 0.0
    if world.on_gpu:
        with world.server(pool=1 << 30, arena=0), world.engine() as engine:
            raw = _raw("pinned host memory to the GPU, raw", engine.ask("pinned_rate", size=8 << 30), "copies of 64 MiB")
        pinned = raw.value
        yield raw
        for library in ("safetensors", "safetensors on the GPU", "fastsafetensors"):
            yield from _load(world, weights, library)
    for where in ("page cache", "disk"):
        with world.server():
            _keep_in_cache(weights, where == "page cache")
            filled = _fill(world, checkpoint)
            yield Figure(f"fill from {where}", _rate(filled), "GB/s", detail=f"{filled.seconds:.2f} s, each chunk verified on the way")
            if where == "page cache":
                yield from _again(world, checkpoint, filled.id, pinned)
                yield from _served(world, checkpoint, filled.id)


def _fill(world: World, checkpoint: Checkpoint, device: str = "", note: bytes = b"") -> pb.Filled:
    """`note` makes another region of the same bytes."""
    layout = pb.Layout()
    layout.CopyFrom(checkpoint.layout)
    layout.note = note
    filled: pb.Filled = world.ask(lambda control: control.fill(layout, checkpoint.parts, device or world.device))
    check(filled.there_before == 0, "it was not there before")
    return filled


def _raw(name: str, rates: list[float], how: str) -> Figure:
    """The best of several: what a fill is compared with."""
    detail = f"8 GiB, {how}, best of {', '.join(f'{rate / 1e9:.1f}' for rate in rates)} in turn"
    return Figure(name, max(rates) / 1e9, "GB/s", detail=detail)


def _rate(filled: pb.Filled) -> float:
    """GB/s."""
    return float(filled.from_arena + filled.from_files + filled.from_device) / filled.seconds / 1e9


def _from_arena(world: World, checkpoint: Checkpoint, pinned: float) -> Iterator[Figure]:
    """The chunks are in the arena already. Each region is a new one: memory that was just given back is being cleared by the driver."""
    rates = [_rate(_fill(world, checkpoint, note=bytes([number]))) for number in range(ROUNDS)]
    detail = f"0.95 of the raw rate; {', '.join(f'{rate:.1f}' for rate in rates)}; each sealed and ready to attach"
    yield Figure("fill from the arena", median(rates), "GB/s", at_least=round(0.95 * pinned, 2), detail=detail)


def _again(world: World, checkpoint: Checkpoint, region: bytes, pinned: float) -> Iterator[Figure]:
    if world.on_gpu:
        yield from _from_arena(world, checkpoint, pinned)
        world.evict(region)
        yield Figure("fill from the arena, straight after an eviction", _rate(_fill(world, checkpoint)), "GB/s")
    world.evict(region)
    with world.engine() as engine:
        engine.tell("fill", directory=str(checkpoint.parts[0].path.parent))
        world.until(lambda: bool((found := world.region(region)) and found.filled_bytes), "a fill is under way")
        engine.kill()
    seconds = world.until(lambda: not world.status().fills, "a fill ends with who asked for it")
    filled = world.ask(lambda control: control.fill(checkpoint.layout, checkpoint.parts, world.device))
    yield Figure(
        "a fill whose caller was killed stops", seconds, "s", at_most=2, detail=f"the next went on from {filled.there_before} bytes"
    )


def _served(world: World, checkpoint: Checkpoint, region: bytes) -> Iterator[Figure]:
    """The filled region is what the files hold, for whoever attaches."""
    with world.engine() as engine:
        first = engine.ask("attach", region=region.hex())["first"]
        check(engine.ask("sum") == _sum(checkpoint), "a region holds what the files hold")
        if world.on_gpu:
            yield from _snapshot(world, engine, first)


def _sum(checkpoint: Checkpoint) -> int:
    """Of a checkpoint's bytes as the region has them, in 64-bit integers, which may wrap around."""
    numbers = np.empty(checkpoint.layout.size // 8, dtype=np.int64)
    bytes_, at = memoryview(numbers.data).cast("B"), 0
    for part in checkpoint.parts:
        size = sum(chunk.size for chunk in checkpoint.layout.chunks[part.first_chunk : part.first_chunk + part.chunks])
        with part.path.open("rb", buffering=0) as file:
            file.seek(part.offset)
            end = min(at + size, len(bytes_))
            while at < end:
                at += file.readinto(bytes_[at:end]) or 0
    return int(numbers.sum())


def _snapshot(world: World, engine: Engine, first: float) -> Iterator[Figure]:
    from cuda.bindings import driver  # noqa: PLC0415  (only where there is a GPU)

    size = list(asdict(world.scale.weights).values())
    built = engine.ask("model", size=size)
    before = engine.ask("run")
    check(before["finite"], "the model computes")
    detail = f"attach {first * 1e3:.1f}, skeleton {built['skeleton'] * 1e3:.1f}, adopt {built['adopt'] * 1e3:.1f} ms; no byte is copied"
    yield Figure("a module of 8B on resident weights", (first + built["skeleton"] + built["adopt"]) * 1e3, "ms", detail=detail)
    quiesced = engine.ask("quiesce")
    running = world.used()
    seconds = {}
    for step in ("Lock", "Checkpoint", "Restore", "Unlock"):
        begin = time.perf_counter()
        code = getattr(driver, f"cuCheckpointProcess{step}")(engine.pid, None)[0]
        check(code.name == "CUDA_SUCCESS", f"cuCheckpointProcess{step}: {code.name}")
        seconds[step] = time.perf_counter() - begin
        if step == "Checkpoint":
            given = (running - world.used()) / (1 << 20)
    resumed = engine.ask("resume")
    after = engine.ask("run")
    check(after["digest"] == before["digest"], "the captured graph answers the same after the restore")
    yield Figure("quiesce", quiesced * 1e3, "ms", detail="unmapped, and proved by the driver and the server")
    yield Figure("CUDA checkpoint", seconds["Lock"] + seconds["Checkpoint"], "s", detail=f"{given:.0f} MiB of GPU memory given back")
    yield Figure("CUDA restore", seconds["Restore"] + seconds["Unlock"], "s")
    yield Figure("resume", resumed * 1e3, "ms", at_most=20, detail="same addresses; the graph captured before answers bit for bit the same")


def _load(world: World, weights: Path, library: str) -> Iterator[Figure]:
    size = world.scale.weights.bytes
    for where in ("page cache",) if library == "safetensors on the GPU" else ("page cache", "disk"):
        with world.server(pool=1 << 30, arena=0), world.engine() as engine:
            _keep_in_cache(weights, where == "page cache")
            try:
                seconds = engine.ask("load", directory=str(weights), library=library)
            except Failed as error:
                yield Figure(f"{library}, {where}", 0, "GB/s", detail=f"did not run: {error}")
                return
        yield Figure(f"{library}, {where}", size / seconds / 1e9, "GB/s", detail=f"{seconds:.2f} s, nothing verified")


def two_gpus(world: World, weights: Path, other: str) -> Iterator[Figure]:
    """From the arena to one GPU, and from there to the other."""
    checkpoint = read_checkpoint(weights)
    with world.server(devices=(world.device, other)) as up:
        detail = f"2 x {world.scale.pool >> 30} GiB; arena of {world.scale.arena >> 30} GiB"
        yield Figure("pools of two GPUs and one arena up", up["fills"], "s", detail=detail)
        with world.engine(other) as engine:
            peer = _raw("GPU to GPU, raw", engine.ask("peer_rate", size=8 << 30), "torch's copy")
        with world.engine() as engine:
            pinned = _raw("pinned host memory to the GPU, raw", engine.ask("pinned_rate", size=8 << 30), "copies of 64 MiB")
        yield pinned
        first = _fill(world, checkpoint)
        yield Figure("fill from page cache", _rate(first), "GB/s", detail=f"{first.seconds:.2f} s, each chunk verified on the way")
        yield from _from_arena(world, checkpoint, pinned.value)
        yield peer
        rates = []
        for number in range(ROUNDS):
            filled = _fill(world, checkpoint, other, bytes([number]))
            check(filled.from_device == checkpoint.layout.size, f"all of it came from the other GPU: {filled}")
            rates.append(_rate(filled))
        detail = f"0.8 of the raw rate; {', '.join(f'{rate:.0f}' for rate in rates)}; each sealed and ready to attach"
        yield Figure("fill from the other GPU", median(rates), "GB/s", at_least=round(0.8 * peer.value, 1), detail=detail)
        with world.engine(other) as there:
            there.ask("attach", region=filled.id.hex())
            check(there.ask("sum") == _sum(checkpoint), "the other GPU holds what the files hold")


def _keep_in_cache(weights: Path, wanted: bool) -> None:
    """Brings the files of a checkpoint into page cache, or takes them out of it."""
    buffer = bytearray(64 << 20)
    for path in sorted(weights.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            if wanted:
                while file.readinto(buffer):
                    pass
            else:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sections(folder: Path, device: str, other: str = "") -> Iterator[Iterator[Figure]]:
    """What is to be shown of a device, or of two. Each raises Failed where something is not right, and the next can go on."""
    world = World(folder, device)
    weights = folder / "weights"
    write_checkpoint(weights, world.scale.weights)
    if other:
        yield two_gpus(world, weights, other)
    else:
        yield lending(world)
        yield filling(world, weights)


def main() -> int:
    console = Console(width=200)
    found = devices()
    figures: list[Figure] = []
    failures = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        for section in sections(Path(folder), found[0], found[1] if len(found) > 1 else ""):
            try:
                for figure in section:
                    figures.append(figure)
                    console.print(f"{figure.name}: {figure.value:.4g} {figure.unit}  {figure.detail}", highlight=False)
            except Failed as failed:
                failures.append(str(failed))
                console.print(f"[red]{failed}[/]\n{(Path(folder) / 'server.log').read_text()[-4000:]}", highlight=False)
    console.print(table(figures))
    if failures:
        console.print(f"[red]failed:[/] {'; '.join(failures)}")
    elif found[0] != HOST:
        console.print(f"kept in {_keep(figures, len(found))}")
    return 0 if not failures and all(figure.met is not False for figure in figures) else 1


def _keep(figures: list[Figure], gpus: int) -> Path:
    import pynvml  # noqa: PLC0415  (only where there is a GPU)

    pynvml.nvmlInit()
    names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(number)) for number in range(gpus)]
    machine = {"gpus": names, "driver": pynvml.nvmlSystemGetDriverVersion()}
    return keep(f"gpumem-GPU{f'-x{gpus}' if gpus > 1 else ''}", "python -m tests.bench.gpu.measure", machine, figures)


if __name__ == "__main__":
    sys.exit(main())
