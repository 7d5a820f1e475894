"""`zerowake snapshot push`, `pull` and `copy`: between this node and stores, by the agent that owns the state folder."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import AsyncIterable
from pathlib import Path
from typing import Annotated

import grpc
import typer
from zerowake_proto import agent_pb2, agent_pb2_grpc

from restore_agent.errors import AgentError
from restore_agent.programs.command_line import Keys, Name, Namespace, State
from restore_agent.programs.connection import connected, run_command
from restore_agent.programs.main import DEFAULT_STATE
from zerowake_shared import bars

STORE = "file:///FOLDER or s3://BUCKET/PREFIX"


def push(
    name: Name,
    to: Annotated[str, typer.Option(help=f"Store: {STORE}, as the agent sees it.", metavar="URL")],
    namespace: Namespace = "default",
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Puts a snapshot into a store, for other nodes to pull. What the store has already is not sent."""
    reference = agent_pb2.SnapshotRef(namespace=namespace, name=name)

    async def pushed() -> None:
        async with connected(state, keys=keys) as stub:
            await _push(stub, reference, to)

    run_command(pushed(), state)


def pull(
    name: Name,
    source: Annotated[
        list[str],
        typer.Option("--from", help=f"Store: {STORE}, as the agent sees it; several, the best first.", metavar="URL"),
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
            _tell(await transferred(f"pulling {name}", stub.Pull(request)), "on this node", "fetched")

    run_command(pulled(), state)


def copy(
    source: Annotated[str, typer.Option("--from", help=f"Store: {STORE}, as the agent sees it.", metavar="URL")],
    to: Annotated[str, typer.Option(help="Store that it is put into.", metavar="URL")],
    name: Annotated[str, typer.Argument(help="Name of the snapshot.", show_default=False)] = "",
    every: Annotated[bool, typer.Option("--all", help="Copy every name of the namespace that the store has.")] = False,
    namespace: Namespace = "default",
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Copies a snapshot from one store into another, without keeping it here. Its signature and every byte are verified on the way."""
    if bool(name) == every:
        raise typer.BadParameter("name one snapshot, or say --all")

    async def copied() -> None:
        async with connected(state, keys=keys) as stub:
            names = [name]
            if every:
                asked = agent_pb2.ListNamesRequest(request_id=secrets.token_hex(8), namespace=namespace, store=source)
                names = [each.name for each in (await stub.ListNames(asked)).snapshots]
            failed = 0
            for each in names:
                reference = agent_pb2.SnapshotRef(namespace=namespace, name=each)
                request = agent_pb2.CopyRequest(request_id=secrets.token_hex(8), snapshot=reference, source=source, destination=to)
                try:
                    _tell(await transferred(f"copying {each}", stub.Copy(request)), f"in {to}", "copied")
                except grpc.aio.AioRpcError as error:
                    if not every:
                        raise
                    failed += 1
                    typer.secho(f"zerowake: {namespace}/{each} is not copied: {error.details()}", err=True, fg="red")
            if every and not names:
                typer.echo(f"{source} has no name in namespace {namespace}")
            if failed:
                raise typer.Exit(1)

    run_command(copied(), state)


def gc(
    store: Annotated[str, typer.Option(help=f"Store: {STORE}, as the agent sees it.", metavar="URL")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    grace: Annotated[float, typer.Option(help="Hours; what is younger stays.", min=1)] = 24.0,
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Removes from a store what no name needs: chunks, manifests and what cut uploads left."""
    request = agent_pb2.CollectRequest(request_id=secrets.token_hex(8), store=store, grace_seconds=grace * 3600, dry_run=dry_run)

    async def collected() -> None:
        async with connected(state, keys=keys) as stub:
            with bars.waiting(f"looking through {store}"):
                found = await stub.Collect(request)
        would = "would be removed" if dry_run else "removed"
        typer.echo(f"{store}: {found.names} names; needed: {_heap(found.needed)}")
        typer.echo(f"  within the grace period of {grace:g} h: {_heap(found.young)}")
        for kind in ("manifests", "chunks", "unfinished"):
            typer.echo(f"  {kind} {would}: {_heap(getattr(found, kind))}")

    run_command(collected(), state)


def _heap(heap: agent_pb2.Heap) -> str:
    ages = f", {heap.youngest_seconds / 3600:.1f} to {heap.oldest_seconds / 3600:.1f} h old" if heap.objects else ""
    return f"{heap.objects} objects, {heap.bytes / 1e6:.1f} MB{ages}"


async def transferred(what: str, updates: AsyncIterable[agent_pb2.TransferUpdate]) -> agent_pb2.TransferResult:
    """The result of a transfer; a bar and a rate until it is there."""
    result = None
    with bars.of_bytes() as bar:
        async for update in updates:
            if update.HasField("result"):
                result = update.result
            else:
                bar.show(what, update.progress.done_bytes, update.progress.total_bytes)
    assert result is not None
    return result


async def withdraw(stub: agent_pb2_grpc.AgentAsyncStub, named: agent_pb2.SnapshotRef, store: str) -> None:
    """Takes a name out of a store, and says what it stood for."""
    request = agent_pb2.WithdrawRequest(request_id=secrets.token_hex(8), snapshot=named, store=store)
    stood_for = (await stub.Withdraw(request)).snapshot.digest[:12] or "a snapshot that counts for nothing on this node"
    typer.echo(f"the name {named.namespace}/{named.name} was withdrawn from {store}; it stood for {stood_for}, whose bytes stay there")


class NotPushed(AgentError):
    """A snapshot that was just taken is on this node alone; says why, and how it is pushed again."""


async def push_taken(stub: agent_pb2_grpc.AgentAsyncStub, taken: agent_pb2.SnapshotRef, to: str, state: Path, keys: Path | None) -> None:
    """What `create` has just taken, into a store. Raises NotPushed."""
    try:
        await _push(stub, taken, to)
    except grpc.aio.AioRpcError as error:
        again = ["zerowake", "snapshot", "push", taken.name, "--to", to]
        again += ["--namespace", taken.namespace] if taken.namespace != "default" else []
        again += ["--state", str(state)] if state != DEFAULT_STATE else []
        again += ["--keys", str(keys)] if keys else []
        raise NotPushed(
            f"snapshot {taken.namespace}/{taken.name}@{taken.digest[:12]} stays on this node and is not in {to}: "
            f"{error.details() or error.code().name}; `{shlex.join(again)}` pushes it again"
        ) from None


async def _push(stub: agent_pb2_grpc.AgentAsyncStub, reference: agent_pb2.SnapshotRef, to: str) -> None:
    request = agent_pb2.PushRequest(request_id=secrets.token_hex(8), snapshot=reference, store=to)
    _tell(await transferred(f"pushing {reference.name}", stub.Push(request)), f"in {to}", "sent")


def _tell(result: agent_pb2.TransferResult, where: str, moved: str) -> None:
    reference, done = result.snapshot, result.progress
    rate = f" at {done.moved_bytes / 1e6 / result.seconds:.0f} MB/s" if done.moved_bytes and result.seconds else ""
    typer.echo(
        f"snapshot {reference.namespace}/{reference.name}@{reference.digest[:12]} is {where}: "
        f"{done.moved_bytes / 1e6:.1f} of {done.total_bytes / 1e6:.1f} MB {moved} in {result.seconds:.2f} s{rate}"
    )
    for complaint in result.complaints:
        typer.secho(f"zerowake: on the way: {complaint}", err=True, fg="yellow")


def add_to(snapshots: typer.Typer) -> None:
    """As commands of `zerowake snapshot`."""
    snapshots.command()(push)
    snapshots.command()(pull)
    snapshots.command()(copy)
    snapshots.command()(gc)
