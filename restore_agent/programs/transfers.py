"""`zerowake snapshot push` and `zerowake snapshot pull`: between this node and stores, by the agent that owns the state folder."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterable
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from zerowake_proto import agent_pb2

from restore_agent.programs.command_line import Keys, Name, Namespace, State
from restore_agent.programs.connection import connected, run_command
from restore_agent.programs.main import DEFAULT_STATE

_STORE = "file:///FOLDER or s3://BUCKET/PREFIX"


def push(
    name: Name,
    to: Annotated[str, typer.Option(help=f"Store: {_STORE}, as the agent sees it.", metavar="URL")],
    namespace: Namespace = "default",
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Puts a snapshot into a store, for other nodes to pull. What the store has already is not sent."""
    reference = agent_pb2.SnapshotRef(namespace=namespace, name=name)
    request = agent_pb2.PushRequest(request_id=secrets.token_hex(8), snapshot=reference, store=to)

    async def pushed() -> None:
        async with connected(state, keys=keys) as stub:
            _tell(await _shown(f"pushing {name}", stub.Push(request)), f"in {to}", "sent")

    run_command(pushed(), state)


def pull(
    name: Name,
    source: Annotated[
        list[str],
        typer.Option("--from", help=f"Store: {_STORE}, as the agent sees it; several, the best first.", metavar="URL"),
    ],
    digest: Annotated[str, typer.Option(help="The snapshot with this digest, whatever the name stands for in the store.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of another snapshot of the same name.")] = False,
    namespace: Namespace = "default",
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Brings a snapshot onto this node's disk. Its signature and every byte are verified; what is here already is not fetched."""
    reference = agent_pb2.SnapshotRef(namespace=namespace, name=name, digest=digest)
    request = agent_pb2.PullRequest(request_id=secrets.token_hex(8), snapshot=reference, stores=source, replace=replace)

    async def pulled() -> None:
        async with connected(state, keys=keys) as stub:
            _tell(await _shown(f"pulling {name}", stub.Pull(request)), "on this node", "fetched")

    run_command(pulled(), state)


async def _shown(what: str, updates: AsyncIterable[agent_pb2.TransferUpdate]) -> agent_pb2.TransferResult:
    """A bar and a rate until the result is there."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    result = None
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=None)
        async for update in updates:
            if update.HasField("result"):
                result = update.result
            else:
                bars.update(task, total=update.progress.total_bytes or None, completed=update.progress.done_bytes)
    assert result is not None
    return result


def _tell(result: agent_pb2.TransferResult, where: str, moved: str) -> None:
    reference, done = result.snapshot, result.progress
    rate = f" at {done.moved_bytes / 1e6 / result.seconds:.0f} MB/s" if done.moved_bytes and result.seconds else ""
    typer.echo(
        f"snapshot {reference.namespace}/{reference.name}@{reference.digest[:12]} is {where}: "
        f"{done.moved_bytes / 1e6:.1f} of {done.total_bytes / 1e6:.1f} MB {moved} in {result.seconds:.2f} s{rate}"
    )


def add_to(snapshots: typer.Typer) -> None:
    """As commands of `zerowake snapshot`."""
    snapshots.command()(push)
    snapshots.command()(pull)
