"""A thousand models asked for in one instant, on a machine that can hold ten: `zerowake up`, with an agent that stands in for such a node.

A replica leaves when its model has been idle for its cooldown, and another model's takes its place: those that come to no turn within their
`max_wait_seconds` are refused. Probes are asked all the time. No replica is made in vain: each that was made answered a request.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import yaml

from tests.bench.figures import Figure
from tests.worlds.ports import free_port

MODELS, ROOM = 1000, 10
WAIT_SECONDS = 30.0
PROBE_SECONDS = 0.1
ROOT = Path(__file__).parents[2]
_START = "import sys; sys.executable = sys.argv.pop(1); from scaler.programs.cli import main; main()"


async def main() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="zerowake-crowd-") as made:
        folder = Path(made)
        state, file, python, log = folder / "state", folder / "up.yaml", folder / "python", folder / "up.log"
        python.write_text(
            f'#!/bin/sh\ncase " $* " in *" agent "*) exec {sys.executable} -m tests.worlds.cramped_agent {ROOM} {MODELS} "$@";; esac\n'
            f'exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        port, metrics = free_port(), free_port()
        model = {"cooldown_seconds": 0.5, "polling_seconds": 8.0, "max_wait_seconds": WAIT_SECONDS}
        told = {"state": str(state), "listen": f"127.0.0.1:{port}", "metrics": f"127.0.0.1:{metrics}"}
        file.write_text(yaml.safe_dump(told | {"models": {f"m{number}": model | {"snapshot": f"m{number}"} for number in range(MODELS)}}))
        with log.open("wb") as output:
            command = [sys.executable, "-c", _START, str(python), "up", str(file)]
            process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, cwd=ROOT)
        try:
            return await _measure(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/readyz", state / "counts.json")
        except BaseException:
            print(log.read_text()[-3000:])
            raise
        finally:
            process.terminate()
            await process.wait()


async def _measure(url: str, probe: str, counts: Path) -> list[Figure]:
    answered: Counter[str] = Counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def ask(number: int) -> float:
            began = time.monotonic()
            async with http.get(f"{url}/models/m{number}/x") as response:
                text = await response.text()
            answered["served" if response.status == 200 else f"{response.status} {json.loads(text)['error']['code']}"] += 1
            return time.monotonic() - began

        async def probed() -> float:
            began = time.monotonic()
            async with http.get(probe) as response:
                assert response.status == 200, await response.text()
            return time.monotonic() - began

        async with asyncio.timeout(60):
            while True:
                try:
                    await probed()
                    break
                except (aiohttp.ClientError, AssertionError):
                    await asyncio.sleep(0.1)
        probes: list[float] = []
        asking = asyncio.gather(*(ask(number) for number in range(MODELS)))
        while not asking.done():
            probes.append(await probed())
            await asyncio.sleep(PROBE_SECONDS)
        longest = max(await asking)
        did = json.loads(counts.read_text())
        begun, again = time.monotonic(), await ask(0)
    said = ", ".join(f"{count} {what}" for what, count in sorted(answered.items()))
    return [
        Figure("a thousand models at once: longest probe", max(probes), "s", at_most=1.0, detail=f"{len(probes)} probes"),
        Figure("answered or refused in words", sum(answered.values()) - 1, "requests", at_least=MODELS, detail=said),
        Figure("longest wait", longest, "s", at_most=WAIT_SECONDS + 3, detail=f"max_wait_seconds: {WAIT_SECONDS:g}"),
        Figure("replicas made in vain", did["made"] - answered["served"] + 1, "replicas", at_most=ROOM, detail=json.dumps(did)),
        Figure("a request afterwards", again, "s", at_most=5.0, detail=f"{time.monotonic() - begun:.2f} s after the last refusal"),
    ]
