"""One run of a benchmark on a GPU, as all of them begin and end it: a folder, a model's weights, a pool of gpumem, a budget of seconds.

    async with begun("parked", seconds=420) as run:
        bench = Bench(run)
        if await run.step("snapshot", bench.create, 60):
            …

A command is `python -m tests.bench.gpu.NAME MODEL [--seconds S] [--work FOLDER] [OPTION…]`. MODEL is a file of `shapes/`; its weights and
its tokenizer are written on this machine, from a seed. OPTIONs are the engine's. What does not fit is refused at once (sizes.py).
After each part all figures are kept, in `tests/bench/results/NAME-GPU-MODEL.json` and in the folder OUT, where that is set; logs go there,
too. A part that has failed is a figure that says so, and makes the exit status 1.

A folder is made below ZEROWAKE_GPU_WORK and removed at the end, but for `--work`, which keeps it: the next command takes the weights, and
whatever else it looks for, from there. `--models FOLDER` is a place of their own for models, such as a tmpfs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from gpumem.client.control import Control
from gpumem.wire.errors import PeerGone
from restore_agent.drivers.cuda import Cuda
from tests.bench.figures import Figure, table
from tests.bench.gpu.results import keep
from tests.bench.gpu.sizes import Needs, Room, needs, refusal, together
from tests.worlds.model_files import write_model
from tests.worlds.model_shapes import SHAPES, Shape, shape_named

LEFT = 64  # MB of the GPU that may be in use after everything has ended
GRACE = 30.0  # seconds that a part may take beyond the budget until it is given up
console = Console(width=220)


class Gpus(Protocol):
    """What of the machine's GPUs a benchmark looks at."""

    def used(self) -> int:
        """Bytes, of all of them together."""

    def total(self) -> int:
        """Bytes that the smallest of them has."""

    def described(self) -> dict[str, Any]:
        """`gpus`, their names, and whatever else bears on a figure."""


class Nvidia:
    """Those that the driver has."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def used(self) -> int:
        return self._cuda.used()

    def total(self) -> int:
        return min(self._cuda.total().values())

    def described(self) -> dict[str, Any]:
        gpu = self._cuda.gpus()
        return {"gpus": gpu.names, "driver": gpu.driver}


@dataclass
class Run:
    """Where a benchmark works, until when it begins anything, and what it has measured."""

    command: str
    gpus: Gpus
    folder: Path
    shape: Shape
    model: Path
    shapes: list[Shape]  # all of them, where a benchmark is of several
    options: list[str]
    until: float  # time.monotonic()
    figures: list[Figure] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)  # what else bears on a figure, such as an engine's version

    @property
    def failed(self) -> bool:
        return any(figure.name.endswith(": failed") for figure in self.figures)

    def add(self, *figures: Figure) -> None:
        self.figures += figures

    def keep(self) -> Path:
        """All that was measured by now, where results are kept, and in OUT."""
        name = self.command.split()[2].rpartition(".")[2]
        machine = self.gpus.described() | self.told
        path = keep(f"{name}-GPU-{self.shape.name}", self.command, machine, self.figures, model=self.shape.config)
        if out := os.environ.get("OUT"):
            shutil.copy(path, out)
        return path

    async def step(self, name: str, work: Callable[[], Awaitable[object]], seconds: float) -> bool:
        """A part of the benchmark. What may take longer than the time that is left is not begun; what fails is a figure, and said.

        After each what was measured is kept: a machine that is taken away, or a limit that ends the command, loses one part.
        """
        left = self.until - time.monotonic()
        if left < seconds:
            console.print(f"\n=== {name}: not begun, {left:.0f} s are left, and it may take {seconds:.0f}")
            return False
        console.print(f"\n=== {name} ({left:.0f} s left)")
        begin = time.monotonic()
        try:
            async with asyncio.timeout(left + GRACE):
                await work()
        except Exception:
            console.print(traceback.format_exc()[-6000:], markup=False)
            self.add(Figure(f"{name}: failed", 1, "", at_most=0))
            return False
        finally:
            self.keep()
        console.print(f"=== {name}: {time.monotonic() - begin:.1f} s")
        return True


@contextlib.asynccontextmanager
async def begun(
    name: str,
    *,
    seconds: float,
    room: Callable[[Needs], Room] = Needs.room,
    words: Sequence[str] | None = None,
    gpus: Gpus | None = None,
    count: int = 0,
    several: Sequence[str] = (),
    at_once: int = 1,
) -> AsyncIterator[Run]:
    """Yields within the pool, and ends with what is kept.

    Args:
        seconds: after which no part is begun, unless the command says --seconds.
        room: what gpumem holds for a model.
        words: the command line behind the program's name; None: this process's.
        gpus: None: NVIDIA's.
        count: of GPUs that there must be; 0: as many as the options name.
        several: the models of a benchmark of several, where the command names none; then MODEL is a list with commas between, and who
            benches them writes their files. None: MODEL is one, and written.
        at_once: how many of several are captured at once.

    Raises:
        SystemExit: there are fewer GPUs; the model does not fit; or, at the end, a part has failed.
    """
    begin = time.monotonic()
    asked, options = _parser(name, seconds, several).parse_known_args(sys.argv[1:] if words is None else words)
    shapes = [shape_named(each) for each in (asked.model if several else [asked.model])]
    shape = Shape(str(len(shapes)), {"models": [each.name for each in shapes]}) if several else shapes[0]
    wanted = together([needs(each, options) for each in shapes], at_once) if several else needs(shape, options)
    gpus = gpus or _nvidia(count or wanted.ranks)
    command = " ".join([f"python -m tests.bench.gpu.{name}", ",".join(each.name for each in shapes), *options])
    with contextlib.ExitStack() as stack:
        stack.callback(os.environ.pop, "GPUMEM_SOCKET", None)
        folder = _folder(name, asked.work, stack)
        models = asked.models or folder / "models"
        models.mkdir(parents=True, exist_ok=True)
        if why := refusal(wanted, gpus.total(), models, folder):
            raise SystemExit(f"{', '.join(each.name for each in shapes)}: {why}")
        run = Run(command, gpus, folder, shape, models / shape.name, shapes, options, begin + asked.seconds)
        os.environ["GPUMEM_SOCKET"] = str(folder / "gpumem.sock")
        if not several:
            await asyncio.to_thread(write_model, run.model, shape)
            console.print(f"{shape}; {time.monotonic() - begin:.0f} s until its files stand")
        before, held = gpus.used(), room(wanted)
        try:
            async with pool(held.reserve, held.arena):
                yield run
        finally:
            _keep_logs(folder)
        left = (gpus.used() - before) / 1e6
        run.add(Figure("GPU memory left over", left, "MB", at_most=LEFT, detail="after everything has ended"))
    console.print(table(run.figures))
    console.print(f"kept in {run.keep()}")
    if run.failed:
        raise SystemExit(1)


@contextlib.asynccontextmanager
async def pool(reserve: int, arena: int) -> AsyncIterator[None]:
    """gpumem with so many GiB of each GPU and of the host."""
    command = ["-c", "from gpumem.programs.commands import app; app()", "serve", "--reserve", f"{reserve}G", "--arena", f"{arena}G"]
    process = await asyncio.create_subprocess_exec(sys.executable, *command)
    try:
        async with asyncio.timeout(120):
            while not await _answers():
                if process.returncode is not None:
                    raise RuntimeError(
                        f"gpumem ended with {process.returncode} as it was to hold {reserve} GiB and an arena of {arena} GiB"
                    )
                await asyncio.sleep(0.1)  # until it listens
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def control(call: Callable[[Control], Awaitable[Any]]) -> Any:
    async with Control.connected(Path(os.environ["GPUMEM_SOCKET"])) as connected:
        return await call(connected)


async def _answers() -> bool:
    try:
        await control(lambda c: c.status())
    except PeerGone:
        return False
    return True


def _parser(name: str, seconds: float, several: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m tests.bench.gpu.{name}", allow_abbrev=False)
    if several:
        parser.add_argument("model", metavar="MODEL,…", nargs="?", type=_list, default=list(several), help=f"of {', '.join(SHAPES)}")
    else:
        parser.add_argument("model", metavar="MODEL", choices=SHAPES, help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--seconds", type=float, default=seconds, help="after which no part is begun (%(default).0f)")
    parser.add_argument("--models", type=Path, help="a folder for models that is kept, such as one in memory")
    parser.add_argument("--work", type=Path, help="a folder that is kept, and used again by the next command")
    return parser


def _list(names: str) -> list[str]:
    if unknown := set(names.split(",")) - set(SHAPES):
        raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}, but {', '.join(SHAPES)}")
    return names.split(",")


def _nvidia(count: int) -> Nvidia:
    cuda = Cuda.find()
    if cuda is None or len(cuda.gpus().uuids) < count:
        raise SystemExit("needs an NVIDIA GPU" if count == 1 else f"needs {count} NVIDIA GPUs")
    return Nvidia(cuda)


def _folder(name: str, kept: Path | None, stack: contextlib.ExitStack) -> Path:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        return kept.resolve()
    work = os.environ.get("ZEROWAKE_GPU_WORK", "/var/tmp")
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"zerowake-{name}-", dir=work)))


def _keep_logs(folder: Path) -> None:
    if kept := os.environ.get("OUT"):
        for log in folder.glob("*.log"):
            shutil.copy(log, kept)
