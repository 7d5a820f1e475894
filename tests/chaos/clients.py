"""Who asks, all the time: a process of its own, which nothing hits, and whose journal says what was asked and what became of it.

    python -m tests.chaos.clients JOURNAL SEED NAME=PORT…

Lines of its input are `go` and `pause` (nothing new is asked; it says `paused` when all has been answered). It ends when its input does.
Each model of each machine has bursts with pauses between them, long enough for it to go to zero.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from pathlib import Path

import aiohttp

from tests.chaos.journal import append
from tests.chaos.table import expected, expected_of_all
from tests.chaos.words import heard

PATIENCE = 60.0  # seconds that a request may take; the gateway holds one for 25 at most
MODELS = ("quick", "stand", "lent", "cold")
_MIX = {"post": 35, "get": 15, "sum": 15, "stream": 20, "leaver": 8, "slow": 7}


class Clients:
    """Those of one run."""

    def __init__(self, journal: Path, seed: str, ports: dict[str, int]) -> None:
        self._journal = journal
        self._chance = random.Random(f"clients {seed}")
        self._ports = ports
        self._go = asyncio.Event()
        self._pending: set[asyncio.Task[None]] = set()
        self._number = 0
        self._seed = seed

    async def run(self) -> None:
        """Until its input ends."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(PATIENCE)) as session:
            bursts = [asyncio.create_task(self._bursts(session, machine, model)) for machine in self._ports for model in MODELS]
            async for word in heard():
                if word == "go":
                    self._go.set()
                elif word == "pause":
                    self._go.clear()
                    while self._pending:
                        await asyncio.wait(self._pending)
                    print("paused", flush=True)
            for burst in bursts:
                burst.cancel()
            if self._pending:
                await asyncio.wait(self._pending)

    async def _bursts(self, session: aiohttp.ClientSession, machine: str, model: str) -> None:
        while True:
            await self._go.wait()
            for _ in range(self._chance.choice((1, 1, 2, 3, 7))):
                self._number += 1
                kind = self._chance.choices(list(_MIX), list(_MIX.values()))[0]
                identity = f"{self._seed}-{self._number}-{self._chance.getrandbits(32):08x}"
                task = asyncio.create_task(self._ask(session, machine, model, kind, identity, self._chance.random()))
                self._pending.add(task)
                task.add_done_callback(self._pending.discard)
                await asyncio.sleep(self._chance.uniform(0, 0.2))
            await asyncio.sleep(self._chance.uniform(0.5, 9.0) * (2 if model == "cold" else 1))

    async def _ask(self, session: aiohttp.ClientSession, machine: str, model: str, kind: str, identity: str, chance: float) -> None:
        append(self._journal, id=identity, what="sent", machine=machine, model=model, kind=kind)
        seen: dict[str, object] = {"status": 0, "error": "", "right": False, "refusal": ""}
        try:
            if kind == "leaver":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05 + chance / 2):
                        await self._exchange(session, machine, model, kind, identity, chance, seen)
            else:
                await self._exchange(session, machine, model, kind, identity, chance, seen)
        except TimeoutError:
            seen["error"] = "no answer"
        except (aiohttp.ClientError, OSError) as error:
            seen["error"] = f"{type(error).__name__}: {error}"[:200]
        append(self._journal, id=identity, what="done", machine=machine, model=model, kind=kind, **seen)

    async def _exchange(
        self, session: aiohttp.ClientSession, machine: str, model: str, kind: str, identity: str, chance: float, seen: dict[str, object]
    ) -> None:
        url = f"http://127.0.0.1:{self._ports[machine]}/models/{model}"
        if kind in ("stream", "slow"):
            count = 3 + int(chance * 20)
            async with session.get(f"{url}/stream?id={identity}&n={count}&seconds=0.02") as response:
                seen["status"] = response.status
                text = b""
                async for piece in response.content.iter_any():
                    text += piece
                    if kind == "slow":
                        await asyncio.sleep(0.05)
                events = [line.split() for line in text.decode().splitlines() if line.startswith("data: ")]
                seen["right"] = [words[1:] for words in events] == [[str(n), expected(model, f"{identity}/{n}")] for n in range(count)]
        elif kind in ("get", "sum"):
            async with session.get(f"{url}/{'sum' if kind == 'sum' else 'answer'}?id={identity}") as response:
                seen["status"], text = response.status, await response.read()
        else:
            async with session.post(f"{url}/answer", json={"id": identity, "seconds": chance / 10}) as response:
                seen["status"], text = response.status, await response.read()
        if seen["status"] != 200:
            seen["refusal"] = text.decode(errors="replace")[:4000]
        elif kind not in ("stream", "slow"):
            answer = json.loads(text)
            right = expected_of_all if kind == "sum" else expected
            seen["right"] = answer == {"id": identity, "answer": right(model, identity)}


if __name__ == "__main__":
    asyncio.run(
        Clients(Path(sys.argv[1]), sys.argv[2], {name: int(port) for name, port in (each.split("=") for each in sys.argv[3:])}).run()
    )
