"""A stranger's path: clone, demo, the page, and on it the waterfall of the request just made; each step in seconds.

The clone lies in an empty folder, and everything is done there as README says it, by the clone's own `make demo` and `zerowake up`. What
this checkout has in .cache is copied there first, and uv keeps what it has downloaded: on a machine with nothing of that, the first step
takes as long as its downloads do. Nothing is waited for but what the stranger sees.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import yaml

from tests.bench.__main__ import RESULTS, keep
from tests.bench.figures import Figure
from tests.worlds.browser import CHROMIUM, chromium
from tests.worlds.first_look import first_look

ROOT = Path(__file__).parents[2]
SETTINGS = yaml.safe_load((ROOT / "deploy/demo/demo.yaml").read_text())
GATEWAY, PAGE = f"http://{SETTINGS['listen']}", f"http://{SETTINGS['metrics']}/"
MODEL = "smollm2"
INSTALLED = "models that cost nothing"  # the demo's first line: by then all is there that it needs
WITHIN_SECONDS = 1800.0


def unavailable() -> str:
    if CHROMIUM is None:
        return "needs Chromium: `make browser` brings it"
    if os.geteuid() != 0:
        return "needs root, for CRIU and namespaces"
    for address in (SETTINGS["listen"], SETTINGS["metrics"]):
        host, _, port = address.rpartition(":")
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return f"something listens at {address}, which is the demo's address"
    return ""


async def main() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="stranger-", dir=os.environ.get("STRANGER_WORK", "/var/tmp")) as folder:
        clone = Path(folder) / "zerowake"
        began = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        cloned = time.monotonic() - began
        cached = [each for each in ("criu", "models") if (ROOT / ".cache" / each).is_dir()]
        for each in cached:
            shutil.copytree(ROOT / ".cache" / each, clone / ".cache" / each)
        installed, shown = await demo(clone)
        began = time.monotonic()
        async with served(clone):
            ready = time.monotonic() - began
            async with chromium() as browser:
                look = await first_look(browser, PAGE, GATEWAY, MODEL)
    of = f"with {', '.join(cached) or 'nothing'} from .cache, and what uv and apt have kept"
    steps = [
        Figure("a stranger's path: git clone", cloned, "s"),
        Figure("make demo, until it begins: environment, CRIU, models", installed, "s", detail=of),
        Figure("make demo, from its first line to its last", shown, "s"),
        Figure("zerowake up, until the page answers", ready, "s"),
        Figure("the page, opened in Chromium", look.opened, "s"),
        Figure("a request from zero, to its whole answer", look.answered, "s", detail=look.origin),
        Figure("the waterfall of that request, on the page", look.shown, "s", detail=", ".join(look.phases)),
    ]
    figures = [*steps, Figure("a stranger's path, all of it", sum(each.value for each in steps), "s")]
    keep(figures, RESULTS / "stranger.json", "python -m tests.bench stranger")
    return figures


async def demo(clone: Path) -> tuple[float, float]:
    """Seconds until its first line, and from there to its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "VIRTUAL_ENV"))}
    began, first, said = time.monotonic(), 0.0, ""
    process = await asyncio.create_subprocess_exec(
        *("make", "demo"), cwd=clone, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, limit=1 << 20
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(WITHIN_SECONDS):
            async for line in process.stdout:
                said += line.decode(errors="replace")
                if INSTALLED in said and not first:
                    first = time.monotonic()
            code = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert code == 0, said[-4000:]
    assert first, said
    return first - began, time.monotonic() - first


@asynccontextmanager
async def served(clone: Path) -> AsyncIterator[None]:
    """`zerowake up` with the demo's file, as the demo's last line says, from when the page answers until the block ends."""
    command = (clone / ".venv/bin/zerowake", "up", "deploy/demo/demo.yaml")
    with (clone / "up.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, cwd=clone, stdout=log, stderr=log)
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(120):
            while True:
                assert process.returncode is None, (clone / "up.log").read_text()
                try:
                    async with http.get(f"{PAGE}readyz") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.05)  # a port tells nobody
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
