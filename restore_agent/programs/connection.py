"""How commands reach the agent of a state folder.

They speak gRPC to the agent that owns it. Where none runs, one lives in the command's own process for as long as the command does: there is
one way to take a snapshot, not two.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from zerowake_proto import agent_pb2_grpc

from restore_agent.drivers.weights import DEFAULT_SOCKET
from restore_agent.programs.command_line import failures_told
from restore_agent.programs.main import CannotRun, enter_own_mounts, serving, socket_of
from zerowake_shared.state_folder import used

Gpumem = Annotated[
    Path, typer.Option(help="Socket of gpumem, for engines whose weights it lends.", envvar="GPUMEM_SOCKET", resolve_path=True)
]


@contextlib.asynccontextmanager
async def connected(state: Path, gpumem: Path = DEFAULT_SOCKET, keys: Path | None = None) -> AsyncIterator[agent_pb2_grpc.AgentAsyncStub]:
    """The agent that runs on this state folder, or one in this process."""
    async with contextlib.AsyncExitStack() as stack:
        path = socket_of(state)
        if not listens(path):
            await stack.enter_async_context(serving(socket.gethostname(), state, gpumem, keys=keys))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{path}"))
        yield agent_pb2_grpc.AgentStub(channel)


def listens(path: Path) -> bool:
    """Whether an agent does, at this socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def run_command(work: Coroutine[Any, Any, None], state: Path) -> None:
    """Runs it to its end, in a process that may have an agent in it. Exits as `failures_told` says."""
    with failures_told(), contextlib.ExitStack() as stack:
        stack.callback(work.close)
        if not listens(socket_of(state)):
            stack.enter_context(used(state))
            enter_own_mounts(state)
        asyncio.run(work)


@contextlib.asynccontextmanager
async def running_agent(state: Path) -> AsyncIterator[agent_pb2_grpc.AgentAsyncStub]:
    """Raises CannotRun: there is none."""
    if not listens(socket_of(state)):
        raise CannotRun(f"no agent runs on {state}, and a standby lives in one: start `zerowake up` or `zerowake agent`")
    async with connected(state) as stub:
        yield stub
