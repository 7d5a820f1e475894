"""A server as its user brings it: snapshotted by the command line, then restored three times at once, each replica asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from zerowake_proto import agent_pb2 as pb

from restore_agent.snapshots.catalog import Catalog
from tests.worlds.agent import PORT, Agent, get
from tests.worlds.command import zerowake

_REQUESTS = 12  # at once to each replica: every worker of a server answers some


async def snapshot(
    agent: Agent,
    name: str,
    command: Sequence[str],
    *more: str,
    health: str = "/health",
    canary: str = "",
    code: int = 0,
    patience: float = 60,
) -> str:
    """`zerowake snapshot create`; what it printed. `more`: options. `code`: its exit status; `patience`: seconds to be ready."""
    options = ["--port", str(PORT), "--health", health, "--canary", canary, "--timeout", str(patience), "--state", str(agent.state)]
    return await zerowake("snapshot", "create", name, *options, *more, "--", *command, code=code)


async def three_at_once(agent: Agent, name: str, path: str, expected: object, processes: int) -> None:
    """Each restored, with so many processes, and each gives `expected` to many requests at once. They are released again."""
    answers = await answers_of_three(agent, name, lambda replica: get(replica, path), processes)
    assert answers == [expected] * len(answers)


async def answers_of_three(
    agent: Agent, name: str, ask: Callable[[pb.Replica], object], processes: int, look: Callable[[], None] | None = None
) -> list[object]:
    """What three replicas, restored at once, say to many requests at once. `look`: called while they are there."""
    manifest = Catalog(agent.state).get("default", name).manifest
    assert len(manifest.processes) == processes, [process.command for process in manifest.processes]
    responses = await asyncio.gather(*(agent.restore(name) for _ in range(3)))
    try:
        reasons = [response.fallback_reason for response in responses if response.replica.origin != pb.ORIGIN_RESTORED]
        assert reasons == [], (agent.state.parent / "agent.log").read_text()[-3000:]
        replicas = [response.replica for response in responses]
        with ThreadPoolExecutor(len(replicas) * 4) as pool:
            answers = list(pool.map(ask, replicas * _REQUESTS))
        if look:
            look()
        return answers
    finally:
        await asyncio.gather(*(agent.release(response.replica) for response in responses))
