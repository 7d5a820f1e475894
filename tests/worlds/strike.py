"""kill -9 in the middle: waits for a phase of what an agent is doing, as it shows from outside, and strikes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from typing import Any

import grpc
from zerowake_proto import agent_pb2 as pb

from restore_agent.snapshots.catalog import Catalog
from tests.worlds.agent import Agent
from tests.worlds.leftovers import nothing_left
from tests.worlds.node import MIB, NAME, Node
from tests.worlds.processes import below, resident

Case = Callable[[Callable[[Node], Coroutine[Any, Any, None]]], None]  # runs one, with a deadline, and looks at what it leaves
RESTORING = ("CRIU makes the processes", "their pages are filled", "CUDA resumes", "CUDA resumes, 100 ms on")
DEMOTING = ("at once", "CUDA has suspended")


def engine_pids(node: Node, agent: Agent) -> list[int]:
    """Host pids of the snapshot's processes, of the replica that is being made or lives."""
    inside = {process.pid for process in Catalog(node.state).get("default", NAME).manifest.processes}
    return [pid for inner, pid, words in below(agent.process.pid) if inner in inside and "sandbox-init" not in words]


async def another_in_its_place(node: Node, agent: Agent, rung: pb.Rung) -> None:
    """Kills the engine that waits on the rung. Once the agent has seen that, a restore makes another one, which answers."""
    pids = engine_pids(node, agent)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while await agent.rung(NAME) == rung:
            await asyncio.sleep(0.02)
    answer = await agent.restore(NAME)
    assert answer.replica.origin == pb.ORIGIN_RESTORED, answer.fallback_detail
    await node.answers(answer.replica, node.expected)


async def the_agent_leaves_nothing(node: Node, agent: Agent) -> None:
    """Killed, with all that waits below it."""
    agent.kill()
    await agent.process.wait()
    await nothing_left(node.state)


def kill(pids: Collection[int]) -> None:
    """Those that are there still."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def strike(node: Node, agent: Agent, phase: str, victim: str, over: threading.Event) -> str:
    """Kills the `agent`, or the `engine`, and says what was seen. Returns "" where `over` is set before the phase was seen. Blocks."""
    holds, began = _phase(node, agent, phase), time.monotonic()
    while not holds():
        if over.is_set():
            return ""
        time.sleep(0.0005)
    pids = [agent.process.pid] if victim == "agent" else engine_pids(node, agent)
    kill(pids)
    return f"{phase}: seen after {time.monotonic() - began:.3f} s, killed {victim} {pids}"


@contextlib.asynccontextmanager
async def killing(node: Node, victim: str, phase: str) -> AsyncIterator[Callable[[asyncio.Task[Any]], None]]:
    """Strikes in a phase of the call that is begun in the block; ends with the call, however that ends."""
    over = threading.Event()
    striking = asyncio.create_task(asyncio.to_thread(strike, node, await node.agent(), phase, victim, over))
    calls: list[asyncio.Task[Any]] = []
    try:
        yield calls.append
        await asyncio.wait(calls)
    finally:
        over.set()
        seen = await striking
    print(f"  {seen or f'{phase}: not seen before the call ended'}")
    assert seen, f"{phase}: not seen before the call ended with {calls[0]}"


def _phase(node: Node, agent: Agent, phase: str) -> Callable[[], bool]:
    manifest = Catalog(node.state).get("default", NAME).manifest
    before = node.used() if node.cuda else 0
    since = 0.0

    def cuda() -> bool:
        return node.used() > before + 32 * MIB

    def cuda_late() -> bool:
        nonlocal since
        since = since or (time.monotonic() if cuda() else 0.0)
        return bool(since) and time.monotonic() - since > 0.1

    phases: dict[str, Callable[[], bool]] = {
        "at once": lambda: True,
        "CRIU makes the processes": lambda: bool(engine_pids(node, agent)),
        "their pages are filled": lambda: sum(map(resident, engine_pids(node, agent))) > 12 * MIB + manifest.page_bytes // 8,
        "CUDA resumes": cuda,
        "CUDA resumes, 100 ms on": cuda_late,
        "CUDA has suspended": lambda: node.used() < before - 32 * MIB,
    }
    return phases[phase]


async def failing(node: Node, agent: Agent, origins: Collection[int]) -> str:
    """What is said of an engine that ends as it wakes: by the agent's answer, where it has seen it by then, else by its stream."""
    try:
        answer = await agent.restore(NAME)
    except grpc.aio.AioRpcError as error:
        return str(error.details())
    if answer.replica.origin == pb.ORIGIN_COLD:
        return str(answer.fallback_detail)
    assert answer.replica.origin in origins, answer
    return await node.gone(answer.replica)
