"""The fault run: `make chaos [SEED=…] [FAULTS=…] [MINUTES=…] [PLANT=…]`. What it is made of: __init__.py.

A run of a seed goes on where it was ended: the journal of its faults, in .cache/chaos/SEED, says which is next. After every EVERY faults
everything is mended, the requests end, and the checker looks. A planted bug ends the run when it is found. KINDS: of faults, and no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos import report, seen
from tests.chaos.faults import draw
from tests.chaos.journal import append, read
from tests.chaos.stack import ROOT, Stack
from tests.chaos.strikes import Strikes

SEED = int(os.environ.get("SEED") or 1)
FAULTS = int(os.environ.get("FAULTS") or 1000)
MINUTES = float(os.environ.get("MINUTES") or 600)
PLANT = os.environ.get("PLANT") or ""
EVERY = int(os.environ.get("EVERY") or 25)
KINDS = os.environ.get("KINDS") or ""
_SETTLE_SECONDS, _SNAPSHOTS_SECONDS = 45.0, 180.0


class Helper:
    """A program of the run's own, which nothing of the stack knows of. It ends when the run does."""

    def __init__(self, *command: str) -> None:
        self._command = command
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Helper:
        command = sys.executable, "-m", *self._command
        self.process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"go\n")

    async def pause(self) -> None:
        """Returns when it rests."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(b"pause\n")
        assert await self.process.stdout.readline() == b"paused\n"


class Run:
    """One run of a seed, in a folder."""

    def __init__(self, folder: Path, stack: Stack) -> None:
        self._folder = folder
        self._stack = stack
        self._strikes = Strikes(stack)
        self._journal = folder / "faults.jsonl"
        self._kinds = {kind: 1 for kind in KINDS.split(",")} if KINDS else None
        self._number = max((line["number"] for line in read(self._journal)), default=-1) + 1
        self._done = sum(line["what"] == "done" for line in read(self._journal))
        self._violations = len(report.checked(folder))
        self._until = time.monotonic() + MINUTES * 60

    async def run(self) -> None:
        """Until the faults or the minutes are over, or a planted bug is found."""
        stack, session = self._stack, f"{SEED}.{self._number}"
        append(stack.journal, what="session", number=self._number)
        await stack.trust_each_other()
        stack.begin()
        await self._ready()
        print(f"seed {SEED}: from fault {self._number} on", flush=True)
        ports = [f"{name}={machine.ports['gateway']}" for name, machine in stack.machines.items()]
        states = [str(machine.state) for machine in stack.machines.values()]
        clients = Helper("tests.chaos.clients", str(self._folder / "requests.jsonl"), session, *ports)
        asked = [f"{name}={machine.ports['keda']}" for name, machine in stack.machines.items()]
        keda = Helper("tests.chaos.keda", str(self._folder / "told.jsonl"), session, *asked)
        bucket, journal = "s3://fleet/extra", str(self._folder / "captures.jsonl")
        captures = Helper("tests.chaos.captures", journal, session, bucket, *states, "--", *stack.engine("extra"))
        async with clients, captures, keda:
            while self._done < FAULTS and time.monotonic() < self._until and not (PLANT and self._violations):
                async with contextlib.AsyncExitStack() as borrowers:
                    for name in "abc":
                        command = "tests.chaos.borrowers", str(stack.socket), str(self._folder / "leases.jsonl"), name
                        await borrowers.enter_async_context(Helper(*command))
                    clients.go()
                    captures.go()
                    keda.go()
                    await self._faults()
                    self._strikes.mend()
                    await asyncio.gather(clients.pause(), captures.pause(), keda.pause())
                await self._look()

    async def _ready(self) -> None:
        """Waits until every model has answered, and every machine has its snapshots."""
        if silent := await seen.silent(self._stack, "first"):
            raise SystemExit("\n".join(silent))
        deadline = time.monotonic() + _SNAPSHOTS_SECONDS
        while waiting := seen.waits_for(self._stack):
            if time.monotonic() > deadline:
                raise SystemExit(f"no snapshots after {_SNAPSHOTS_SECONDS:.0f} s: {', '.join(waiting)}")
            await asyncio.sleep(0.3)  # one is taken after the other

    async def _faults(self) -> None:
        for _ in range(EVERY):
            fault = draw(SEED, self._number, self._kinds)
            await asyncio.sleep(fault.pause)
            began = time.time()
            struck = await self._strikes.strike(fault)
            append(self._journal, what="done" if struck else "missed", began=began, **fault.written())
            self._number, self._done = self._number + 1, self._done + struck
            if self._done >= FAULTS:
                break

    async def _look(self) -> None:
        """Waits until nothing is left over, with a deadline, writes down what is, and has it all checked."""
        stack = self._stack
        silent = await seen.silent(stack, f"{self._number}-{time.time():.0f}")
        deadline = time.monotonic() + _SETTLE_SECONDS
        while (left := await seen.left_over(stack)) and time.monotonic() < deadline:
            await asyncio.sleep(0.3)  # replicas cool down
        # Agents keep connections to the store for the next transfer: those are ended as a server ends idle ones, and what stays is a leak.
        stack.proxy.cut()
        await asyncio.sleep(1)
        append(self._folder / "seen.jsonl", number=self._number, left=left, silent=silent, programs=seen.programs(stack))
        found = report.checked(self._folder)
        for violation in found[self._violations :]:
            print(f"  VIOLATION {violation.kind}: {violation.text}", flush=True)
        self._violations = len(found)
        asked = sum(line["what"] == "done" for line in read(self._folder / "requests.jsonl"))
        print(f"{time.strftime('%H:%M:%S')} {self._done} faults, {asked} requests, {len(found)} violations", flush=True)


async def run(folder: Path) -> None:
    """A run, and whatever ends it, an end of its processes."""
    task = asyncio.current_task()
    assert task
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with Stack(folder, PLANT) as stack:
        try:
            await Run(folder, stack).run()
        except asyncio.CancelledError:
            append(stack.journal, what="interrupted")
            raise


def folder_of(seed: int, plant: str = "") -> Path:
    return ROOT / ".cache/chaos" / (f"{seed}-{plant}" if plant else str(seed))


def main() -> None:
    folder = folder_of(SEED, PLANT)
    if PLANT:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(run(folder))
    violations = report.checked(folder)
    print(report.said([folder]))
    sys.exit(bool(violations) != bool(PLANT))


if __name__ == "__main__":
    main()
