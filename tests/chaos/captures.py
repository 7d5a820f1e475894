"""Who takes snapshots, pushes them, fetches them on the other machine, and removes them, all the time: a process of its own.

    python -m tests.chaos.captures JOURNAL SEED BUCKET-URL STATE… -- ENGINE…

Its input has the words of the clients (clients.py). What has come of a fetch that was refused stays on the disk for whoever goes on with
it, as is done before a pause. Whatever a call is answered with is right here, but it has to be answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import sys
from pathlib import Path

import grpc
from zerowake_proto import agent_pb2 as pb
from zerowake_proto import agent_pb2_grpc

from tests.chaos.journal import append
from tests.chaos.words import heard

PATIENCE = 90.0  # seconds; an engine has 25 to become ready, and a proof two restores
_NAME = pb.SnapshotRef(namespace="default", name="extra")


class Captures:
    """Those of one run, on one machine after the other."""

    def __init__(self, journal: Path, seed: str, store: str, states: list[Path], command: list[str]) -> None:
        self._journal, self._store, self._states, self._command = journal, store, states, command
        self._chance = random.Random(f"captures {seed}")
        self._go = asyncio.Event()
        self._rests = asyncio.Event()
        self._rests.set()
        self._coming: list[tuple[Path, str, pb.SnapshotRef]] = []  # what is fetched: to which machine, from where

    async def run(self) -> None:
        """Until its input ends."""
        taking = asyncio.create_task(self._take_all())
        async for word in heard():
            if word == "go":
                self._go.set()
            else:
                self._go.clear()
                await self._rests.wait()
                await self._go_on()
                print("paused", flush=True)
        taking.cancel()

    async def _take_all(self) -> None:
        while True:
            for state in self._states:
                await self._go.wait()
                self._rests.clear()
                try:
                    await self._take(state)
                finally:
                    self._rests.set()
                await asyncio.sleep(self._chance.uniform(1.0, 4.0))

    async def _take(self, state: Path) -> None:
        machine = state.parent.name
        append(self._journal, what="began", machine=machine)
        error = ""
        try:
            async with asyncio.timeout(PATIENCE), grpc.aio.insecure_channel(f"unix:{state}/agent.sock") as channel:
                stub = agent_pb2_grpc.AgentStub(channel)
                async for update in stub.Snapshot(self._request()):
                    taken = update.result.snapshot
                if self._chance.random() < 0.5:
                    store = f"{self._store}/{machine}"
                    async for _ in stub.Push(pb.PushRequest(request_id=secrets.token_hex(4), snapshot=taken, store=store)):
                        pass
                    coming = next(each for each in self._states if each != state), store, taken
                    self._coming.append(coming)
                    await self._fetch(*coming)
                    self._coming.remove(coming)
        except grpc.aio.AioRpcError as refused:
            error = f"{refused.code().name}: {refused.details()}"
        except TimeoutError:
            error = "no answer"
        append(self._journal, what="done", machine=machine, error=error[:500])
        for each in self._states:
            await self._remove(each)

    async def _go_on(self) -> None:
        """With all fetches that did not come to their end: nothing is in their way now."""
        while self._coming:
            state, _, _ = coming = self._coming[0]
            error = "no answer"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    while error:
                        try:
                            await self._fetch(*coming)
                            error = ""
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.3)  # its agent may begin yet
            append(self._journal, what="done", machine=state.parent.name, error=error)
            await self._remove(state)
            del self._coming[0]

    async def _remove(self, state: Path) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(10), grpc.aio.insecure_channel(f"unix:{state}/agent.sock") as channel:
                gone = pb.UnstageRequest(request_id=secrets.token_hex(4), snapshot=_NAME, rung=pb.RUNG_ABSENT)
                await agent_pb2_grpc.AgentStub(channel).Unstage(gone)

    async def _fetch(self, state: Path, store: str, snapshot: pb.SnapshotRef) -> None:
        async with grpc.aio.insecure_channel(f"unix:{state}/agent.sock") as channel:
            wanted = pb.PullRequest(request_id=secrets.token_hex(4), snapshot=snapshot, stores=[store], replace=True)
            async for _ in agent_pb2_grpc.AgentStub(channel).Pull(wanted):
                pass

    def _request(self) -> pb.SnapshotRequest:
        engine = pb.Engine(
            command=self._command,
            env={"PATH": os.environ["PATH"]},
            directory="/",
            port=int(self._command[2]),
            health_path="/health",
            ready_timeout_seconds=25,
        )
        return pb.SnapshotRequest(
            request_id=secrets.token_hex(4), snapshot=_NAME, model="extra", engine=engine, canary=pb.Canary(path="/sum"), replace=True
        )


if __name__ == "__main__":
    at = sys.argv.index("--")
    journal, seed, store, *states = sys.argv[1:at]
    asyncio.run(Captures(Path(journal), seed, store, [Path(each) for each in states], sys.argv[at + 1 :]).run())
