"""`zerowake agent`, `zerowake snapshot …`, `zerowake standby` and `zerowake park`; keys.py has `zerowake key …`.

transfers.py has `snapshot push` and `snapshot pull`, connection.py how all of them reach an agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from zerowake_proto import agent_pb2, agent_pb2_grpc

from gpumem.programs.commands import parse_reserve, parse_size
from restore_agent.drivers.weights import DEFAULT_SOCKET
from restore_agent.engine.presets import KINDS, Setting, fewer_cpus, prepare
from restore_agent.engine.renewal import WANTED
from restore_agent.kubernetes.nri import SOCKET as NRI_SOCKET
from restore_agent.places.placeholder import DEFAULT_FOLDER
from restore_agent.programs import keys as key_commands
from restore_agent.programs import listing, transfers
from restore_agent.programs.command_line import Keys, Name, Namespace, State, failures_told
from restore_agent.programs.connection import Gpumem, connected, run_command, running_agent
from restore_agent.programs.main import DEFAULT_STATE, CannotRun, Listen, Sharing, die_with_parent, enter_own_mounts, run
from restore_agent.sequences.parked_budget import Share
from restore_agent.snapshots.catalog import Catalog
from restore_agent.transfer.store_url import check_url
from zerowake_shared import bars, log
from zerowake_shared.address import Address
from zerowake_shared.command_limits import flaw_of_command, flaw_of_environment
from zerowake_shared.engine_identity import engine_identity
from zerowake_shared.output import Format, Output
from zerowake_shared.phases import Phase
from zerowake_shared.state_folder import used

app = typer.Typer(no_args_is_help=True)
snapshots = typer.Typer(no_args_is_help=True, help="Takes, lists, verifies, signs and removes snapshots of model servers.")
app.add_typer(snapshots, name="snapshot")
app.add_typer(key_commands.app, name="key")
transfers.add_to(snapshots)

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH")
_STEPS: dict[str, str] = {
    Phase.WEIGHTS: "filling gpumem with its weights",
    Phase.START: "starting the engine",
    Phase.READY: "waiting for its health",
    Phase.REQUEST: "asking it a real request",
    Phase.QUIESCE: "waiting until it is quiet",
    Phase.CACHES: "keeping its compile caches",
    Phase.SUSPEND: "suspending its GPU state",
    Phase.DUMP: "dumping it",
    Phase.RESUME: "resuming its GPU state",
    Phase.SPLIT: "storing its pages",
    Phase.PROVE: "restoring it and asking again",
    Phase.PUBLISH: "publishing",
}


@app.command()
def agent(
    state: State = DEFAULT_STATE,
    node: Annotated[str, typer.Option(help="Name of this node.", envvar="NODE_NAME", show_default="this machine's")] = socket.gethostname(),
    gpumem: Gpumem = DEFAULT_SOCKET,
    metrics: Annotated[str, typer.Option(help="HOST:PORT that serves /metrics, /healthz and /readyz.", metavar="HOST:PORT")] = "",
    listen: Annotated[str, typer.Option(help="HOST:PORT for a scaler on another machine; needs --tls.", metavar="HOST:PORT")] = "",
    tls: Annotated[Path | None, typer.Option(help="Folder with tls.crt, tls.key and ca.crt, for --listen and --peers.")] = None,
    peers: Annotated[
        str,
        typer.Option(help="HOST:PORT that serves snapshots to other agents; needs --tls, and keys that they share.", metavar="HOST:PORT"),
    ] = "",
    peer_rate: Annotated[
        str, typer.Option(help="Bytes a second (1GiB) that all other agents together get.", envvar="ZEROWAKE_PEER_RATE", metavar="SIZE")
    ] = "1GiB",
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="Restore into the pods of this node.")] = False,
    cri: Annotated[
        Path | None, typer.Option(help="The container runtime's socket; containerd's or CRI-O's usual one if not given.")
    ] = None,
    nri: Annotated[Path, typer.Option(help="The container runtime's socket for plugins.")] = NRI_SOCKET,
    placeholder: Annotated[Path, typer.Option(help="Folder of the node that is mounted into containers.")] = DEFAULT_FOLDER,
    kubelet: Annotated[Path, typer.Option(help="The kubelet's folder.")] = Path("/var/lib/kubelet"),
    plain_stores: Annotated[bool, typer.Option("--plain-stores", help="With --kubernetes: begin stores without a key, too.")] = False,
    parked_bytes: Annotated[
        str,
        typer.Option(
            help="What parked replicas may hold of each GPU: a size (8GiB) or a fraction (0.1).",
            envvar="ZEROWAKE_PARKED_BYTES",
            metavar="SIZE",
        ),
    ] = "0.1",
    memory: Annotated[
        str,
        typer.Option(
            help="What images that are staged may take of the node's memory: a size (80GiB) or a fraction (0.5).",
            envvar="ZEROWAKE_MEMORY",
            metavar="SIZE",
        ),
    ] = "1.0",
    disk: Annotated[
        str,
        typer.Option(
            help="What snapshots may take of the disk of --state: a size (500GiB) or a fraction (0.8).",
            envvar="ZEROWAKE_DISK",
            metavar="SIZE",
        ),
    ] = "1.0",
    keys: Keys = None,
    parent: Annotated[int, typer.Option(hidden=True, help="The process whose child this is, and with which it ends.")] = 0,
) -> None:
    """Runs the restore agent of this node, until it is told to stop."""
    log.configure()
    with failures_told(), contextlib.ExitStack() as stack:
        if peers and not tls:
            raise CannotRun("--peers and --tls belong together: whoever reaches that port may read snapshots")
        if bool(listen or peers) != bool(tls):
            raise CannotRun("--listen and --tls belong together: whoever reaches the agent may start programs as root")
        shows, parked, images = _metrics_address(metrics), _share("--parked-bytes", parked_bytes), _share("--memory", memory)
        of_disk = _share("--disk", disk)
        if parent:  # before the folder is: that of a parent that has ended is free
            die_with_parent(parent)
        stack.enter_context(used(state))
        enter_own_mounts(state)
        serves = Listen(listen, tls) if tls and listen else None
        sharing = Sharing(peers, tls, _rate(peer_rate)) if tls and peers else None
        beside = None
        if kubernetes:
            from restore_agent.programs.on_kubernetes import Kubernetes, serve_pods  # noqa: PLC0415  (only here is the API's client needed)

            beside = functools.partial(serve_pods, Kubernetes(cri, nri, placeholder, kubelet, plain_stores))
        asyncio.run(run(node, state, gpumem, shows, serves, beside, parked, keys, sharing, images, of_disk))


@snapshots.command()
def create(
    name: Name,
    command: Annotated[list[str], typer.Argument(help="The server's command, after --.", metavar="-- COMMAND…")],
    port: Annotated[int, typer.Option(help="Port that the server listens on.", min=1, max=65535)],
    engine: Annotated[str, typer.Option(help=f"What the server is, where it needs more than its command: {', '.join(KINDS)}.")] = "",
    model: Annotated[str, typer.Option(help="Model name; the snapshot's name if not given.")] = "",
    health: Annotated[str, typer.Option(help="Path that answers 200 when the server is ready.")] = "/health",
    canary: Annotated[
        str, typer.Option(help="PATH=JSON of the request that proves a replica; found by itself for OpenAI-compatible servers.")
    ] = "",
    adapter: Annotated[
        list[str], typer.Option(help="LoRA adapter, by the name that the server answers to; those that it lists are found by themselves.")
    ] = [],  # noqa: B006
    env: Annotated[list[str], typer.Option(help="KEY=VALUE for the server.")] = [],  # noqa: B006
    directory: Annotated[Path, typer.Option(help="Working directory of the server.")] = Path(),
    shared: Annotated[
        list[Path], typer.Option(help="Folder that stays the machine's own; what is written elsewhere is each replica's.")
    ] = [],  # noqa: B006
    renew: Annotated[
        bool,
        typer.Option(
            "--renew", help="Have each replica make its random state anew: of OpenSSL, C's library, Python and Node; fixed seeds, too."
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds the server may take to be ready.", min=0)] = 600.0,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a snapshot of the same name.")] = False,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Leave the server running, as a replica of a running agent.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Checkpoint directory (safetensors) whose weights gpumem lends to the server.")
    ] = None,
    to: Annotated[
        str, typer.Option(help=f"Store that it is then put into, as by `zerowake snapshot push`: {transfers.STORE}.", metavar="URL")
    ] = "",
    gpumem: Gpumem = DEFAULT_SOCKET,
    namespace: Namespace = "default",
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Starts a server, takes a snapshot of it when it is ready, and proves that a restored replica answers the same."""
    path, _, body = canary.partition("=")
    pairs = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    own: dict[str, str] = {}
    for item in env:
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"--env {item!r} is not KEY=VALUE")
        own[key] = value
    pairs |= {WANTED: "1"} | own if renew else own
    identity = engine_identity(command, own, str(directory.resolve()))
    if engine:
        if weights:
            raise typer.BadParameter(f"--weights is for engines that attach what they are told; {engine} brings its own")
        with failures_told():
            setting = Setting(port, gpumem, state / "weights", cpus=fewer_cpus())
            command, more, health = prepare(engine, command, setting, {**os.environ, **pairs})
        pairs = more | pairs
    with failures_told():
        if why := flaw_of_command(command) or flaw_of_environment(pairs, command):
            raise CannotRun(f"the server cannot be started: {why}")
        if to:
            check_url(to)  # before minutes of work
        request = agent_pb2.SnapshotRequest(
            request_id=secrets.token_hex(8),
            snapshot=agent_pb2.SnapshotRef(namespace=namespace, name=name),
            model=model or name,
            engine=agent_pb2.Engine(
                command=command,
                env=pairs,
                directory=str(directory.resolve()),
                port=port,
                health_path=health,
                ready_timeout_seconds=timeout,
                shared=[str(folder.expanduser().resolve()) for folder in shared],
            ),
            canary=agent_pb2.Canary(path=path, body=body.encode()),
            adapters=adapter,
            template_hash=identity,
            keep_serving=keep_serving,
            replace=replace,
            weights=str(weights.resolve()) if weights else "",
        )
    run_command(_create(request, to, state, gpumem, keys), state)


@snapshots.command("list")
def list_snapshots(state: State = DEFAULT_STATE, keys: Keys = None, output: Output = Format.TEXT) -> None:
    """Lists the snapshots on this node."""
    with failures_told():
        listing.print_snapshots(Catalog(state, keys).list(), output)


@snapshots.command()
def show(name: Name, namespace: Namespace = "default", state: State = DEFAULT_STATE, keys: Keys = None) -> None:
    """Prints a snapshot's manifest."""
    with failures_told():
        snapshot = Catalog(state, keys).get(namespace, name)
    typer.echo(json.dumps({"digest": snapshot.digest, **snapshot.manifest.model_dump(mode="json")}, indent=2))


@snapshots.command()
def verify(name: Name, namespace: Namespace = "default", state: State = DEFAULT_STATE, keys: Keys = None) -> None:
    """Verifies a snapshot's signature, reads every byte of it, and compares it with its hash."""
    with failures_told():
        catalog = Catalog(state, keys)
        snapshot = catalog.get(namespace, name)
        signature = catalog.signature(snapshot)
        with bars.of_bytes() as bar:
            catalog.verify(snapshot, functools.partial(bar.show, f"verifying {name}"))
    adapters = ", ".join(adapter.name for adapter in snapshot.manifest.adapters)
    proved = f"; it was proved with its adapters {adapters}" if adapters else ""
    whole = f"{len(snapshot.chunks)} chunks and {len(snapshot.manifest.files)} files are whole"
    typer.echo(f"{snapshot}: {whole}, signed by key {signature.key}{proved}")


@snapshots.command()
def sign(name: Name, namespace: Namespace = "default", state: State = DEFAULT_STATE, keys: Keys = None) -> None:
    """Reads every byte of a snapshot and, where all are what it says, signs it by this node's key, whoever signed it before."""
    with failures_told():
        catalog = Catalog(state, keys)
        with bars.of_bytes() as bar:
            snapshot = catalog.sign(namespace, name, functools.partial(bar.show, f"verifying {name}"))
        typer.echo(f"{snapshot}: signed by key {catalog.signature(snapshot).key}")


@snapshots.command()
def rm(
    name: Name,
    store: Annotated[str, typer.Option(help=f"Store to withdraw the name from instead: {transfers.STORE}.", metavar="URL")] = "",
    namespace: Namespace = "default",
    state: State = DEFAULT_STATE,
    keys: Keys = None,
) -> None:
    """Removes a snapshot from this node, or with --store its name from a store, where its bytes stay."""

    async def remove(stub: agent_pb2_grpc.AgentAsyncStub) -> None:
        reference = agent_pb2.SnapshotRef(namespace=namespace, name=name)
        if store:
            return await transfers.withdraw(stub, reference, store)
        await stub.Unstage(agent_pb2.UnstageRequest(request_id=secrets.token_hex(8), snapshot=reference, rung=agent_pb2.RUNG_ABSENT))

    async def asked() -> None:
        async with connected(state, keys=keys) as stub:
            await remove(stub)

    run_command(asked(), state)


@app.command()
def standby(
    name: Name,
    drop: Annotated[bool, typer.Option("--drop", help="End the standby instead.")] = False,
    keep: Annotated[float, typer.Option(help="Seconds until it is dropped unless it was used; 0: kept.", min=0)] = 0.0,
    namespace: Namespace = "default",
    state: State = DEFAULT_STATE,
) -> None:
    """Restores a replica ahead of need, without GPU memory, in the running agent: the next request only has to wake it."""
    reference = agent_pb2.SnapshotRef(namespace=namespace, name=name)
    if drop:
        _unstage(state, reference, agent_pb2.RUNG_MEMORY, "no standby, the image stays in memory")
    else:
        _stage(state, agent_pb2.StageRequest(snapshot=reference, rung=agent_pb2.RUNG_STANDBY, keep_seconds=keep), "standby")


@app.command()
def park(
    name: Name,
    back: Annotated[bool, typer.Option("--back", help="Make it a standby again instead.")] = False,
    keep: Annotated[float, typer.Option(help="Seconds until it becomes a standby unless it was used; 0: kept.", min=0)] = 0.0,
    standby_seconds: Annotated[float, typer.Option(help="Seconds for which it is kept as a standby then; 0: kept.", min=0)] = 0.0,
    namespace: Namespace = "default",
    state: State = DEFAULT_STATE,
) -> None:
    """Makes a standby, and gives it its GPU state back: the next request finds it on the GPU and only waits for its weights."""
    reference = agent_pb2.SnapshotRef(namespace=namespace, name=name)
    if back:
        _unstage(state, reference, agent_pb2.RUNG_STANDBY, "nothing of it is parked")
    else:
        request = agent_pb2.StageRequest(snapshot=reference, rung=agent_pb2.RUNG_PARKED, keep_seconds=keep, standby_seconds=standby_seconds)
        _stage(state, request, "parked")


def _stage(state: Path, request: agent_pb2.StageRequest, rung: str) -> None:
    async def stage() -> None:
        async with running_agent(state) as stub:
            with bars.waiting(f"{request.snapshot.name} is to be {rung}"):
                answer = await stub.Stage(request)
        found = answer.residency
        held = f", holding {found.parked_bytes[0] / 1e9:.2f} GB of its GPU" if rung == "parked" and found.parked_bytes else ""
        typer.echo(
            f"{found.snapshot.namespace}/{found.snapshot.name}@{found.snapshot.digest[:12]}: {rung} after {answer.seconds:.2f} s{held}"
        )

    request.request_id = secrets.token_hex(8)
    with failures_told():
        asyncio.run(stage())


def _unstage(state: Path, reference: agent_pb2.SnapshotRef, rung: agent_pb2.Rung, done: str) -> None:
    async def unstage() -> None:
        async with running_agent(state) as stub:
            await stub.Unstage(agent_pb2.UnstageRequest(request_id=secrets.token_hex(8), snapshot=reference, rung=rung))
        typer.echo(f"{reference.namespace}/{reference.name}: {done}")

    with failures_told():
        asyncio.run(unstage())


async def _create(request: agent_pb2.SnapshotRequest, to: str, state: Path, gpumem: Path, keys: Path | None) -> None:
    async with connected(state, gpumem, keys) as stub:
        result = None
        with bars.of_steps() as bar:
            async for update in stub.Snapshot(request):
                if update.HasField("result"):
                    result = update.result
                else:
                    step = update.progress
                    bar.show(_STEPS.get(step.phase, step.phase), step.done_bytes, step.total_bytes)
        assert result is not None
        _tell_created(result)
        if to:
            await transfers.push_taken(stub, result.snapshot, to, state, keys)


def _tell_created(result: agent_pb2.SnapshotResult) -> None:
    console = Console(stderr=True)
    for phase in result.phases:
        console.print(f"  {_STEPS.get(phase.name, phase.name):<36} {phase.seconds:7.2f} s", highlight=False)
    reference = result.snapshot
    adapters = f", with its adapters {', '.join(result.adapters)}" if result.adapters else ""
    typer.echo(
        f"snapshot {reference.namespace}/{reference.name}@{reference.digest[:12]}: {result.image_bytes / 1e6:.0f} MB, "
        f"of which CRIU restores {result.skeleton_bytes / 1e6:.1f} MB; proved{adapters}"
    )
    for note in result.notes:
        typer.echo(f"note: {note}")


def _share(option: str, text: str) -> Share:
    """Raises CannotRun."""
    try:
        return parse_reserve(text)
    except typer.BadParameter as error:
        raise CannotRun(f"{option} {error}") from None


def _rate(text: str) -> int:
    """Raises CannotRun."""
    try:
        if rate := parse_size(text):
            return rate
    except typer.BadParameter as error:
        raise CannotRun(f"--peer-rate {error}") from None
    raise CannotRun("--peer-rate 0 would serve nobody; leave --peers away for that")


def _metrics_address(text: str) -> Address | None:
    """Raises CannotRun."""
    try:
        return Address.to_listen(text) if text else None
    except ValueError as error:
        raise CannotRun(f"--metrics {error}") from None
