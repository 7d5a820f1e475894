"""`zerowake up` and its agent as processes on one machine, with what both of them show to Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.worlds.ports import free_port

PATIENCE = 120.0  # seconds; the machine may do something else besides


@dataclass
class Machine:
    process: asyncio.subprocess.Process
    session: aiohttp.ClientSession
    ports: dict[str, int]  # gateway, scaler, agent

    @property
    def pages(self) -> tuple[int, int]:
        """The ports at which scaler and agent show themselves."""
        return self.ports["scaler"], self.ports["agent"]

    async def page(self, program: str, accept: str = "text/plain") -> str:
        """What the scaler or the agent shows now."""
        url = f"http://127.0.0.1:{self.ports[program]}/metrics"
        async with self.session.get(url, headers={"Accept": accept}) as response:
            return await response.text()

    async def value(self, program: str, series: str) -> float | None:
        """Of a series by its name and labels, as the page has them; None: it is not there."""
        found = re.search(rf"^{re.escape(series)} (\S+)$", await self.page(program), re.MULTILINE)
        return float(found[1]) if found else None

    async def until(self, program: str, series: str, holds: Callable[[float], bool]) -> None:
        """Waits for a series to be there and so."""
        last: float | None = None
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):  # one that is being started again
                        last = await self.value(program, series)
                        if last is not None and holds(last):
                            return
                    await asyncio.sleep(0.05)  # a page of metrics tells nobody
        except TimeoutError:
            raise AssertionError(f"{series} of the {program} was {last} at last") from None

    async def ask(self, model: str, path: str, **headers: str) -> int:
        """The status of the answer."""
        url = f"http://127.0.0.1:{self.ports['gateway']}/models/{model}{path}"
        async with self.session.get(url, headers=headers) as response:
            await response.read()
            return response.status

    def agent_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"agent" in Path(f"/proc/{pid}/cmdline").read_bytes())


@contextlib.asynccontextmanager
async def machine(state: Path, models: dict[str, Any], environment: dict[str, str] | None = None, **more: Any) -> AsyncIterator[Machine]:
    """`models`: as in zerowake.yaml. `more`: of that file, beside them."""
    ports = {"gateway": free_port(), "scaler": free_port(), "agent": free_port()}
    file = state.parent / "machine.yaml"
    addresses = dict(zip(("listen", "metrics", "agent_metrics"), (f"127.0.0.1:{port}" for port in ports.values()), strict=True))
    file.write_text(yaml.safe_dump({"state": str(state), "drain_seconds": 1, "models": models} | addresses | more))
    command = [sys.executable, "-m", "scaler.programs.cli", "up", str(file)]
    with (state.parent / "machine.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, stderr=log, stdout=log, env=environment)
    try:
        async with aiohttp.ClientSession() as session:
            made = Machine(process, session, ports)
            async with asyncio.timeout(PATIENCE):
                while not await _is_ready(made):
                    await asyncio.sleep(0.05)  # until it listens
            yield made
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 30)


async def _is_ready(made: Machine) -> bool:
    assert made.process.returncode is None, "it has ended; machine.log says why"
    try:
        async with made.session.get(f"http://127.0.0.1:{made.ports['scaler']}/readyz") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False
