"""`zerowake up`, `zerowake serve`, `zerowake status`, `zerowake plan`, `zerowake trace` and `zerowake simulate`."""

from __future__ import annotations

import asyncio
import datetime
import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import aiohttp
import typer
import uvloop
import yaml
from rich.console import Console

from scaler.local.config import BadConfig, load
from scaler.programs.doctor import Format, Output
from scaler.view import plan_shown, waterfall_shown
from scaler.view.state import as_activation
from scaler.view.status import SCALER_SOCKET, socket_of
from scaler.view.waterfall import LAST
from zerowake_shared import log, tables
from zerowake_shared.kubernetes.errors import ClusterError
from zerowake_shared.listening import CannotListen
from zerowake_shared.one_line import described, errors_in_one_line
from zerowake_shared.state_folder import FolderInUse, UnusableFolder
from zerowake_shared.tls import BadCertificate

app = typer.Typer(no_args_is_help=True)
_DEFAULT_STATE = Path("/var/lib/zerowake")
_ON_KUBERNETES = " On Kubernetes ask in a scaler's pod: kubectl exec -n NAMESPACE deploy/zerowake-scaler -- zerowake "
State = Annotated[
    Path | None,
    typer.Option(
        help="State folder of `zerowake up`. Unless given: /var/lib/zerowake, or the scaler of this pod.",
        envvar="ZEROWAKE_STATE",
        resolve_path=True,
    ),
]


@app.command()
def up(file: Annotated[Path, typer.Argument(help="YAML that names the models.", readable=False)]) -> None:
    """Serves models on this machine: gateway, scaler, autoscaler and restore agent, until stopped."""
    # Not above: what serves takes longer to import than `zerowake status` to answer. Each agent is a `zerowake`, too.
    from scaler.programs.up import AgentFailed  # noqa: PLC0415
    from scaler.programs.up import up as run_up  # noqa: PLC0415

    log.configure()
    with errors_in_one_line("zerowake", BadConfig, CannotListen, BadCertificate, FolderInUse, UnusableFolder, AgentFailed):
        uvloop.run(run_up(load(file)))


@app.command()
def serve(file: Annotated[Path, typer.Argument(help="YAML with addresses and certificates; the chart writes it.", readable=False)]) -> None:
    """Serves the models of a Kubernetes cluster: gateway, KEDA's scaler, controller and webhook, beside other replicas of it."""
    from scaler.programs import serve_config  # noqa: PLC0415
    from scaler.programs.serve import serve as run_serve  # noqa: PLC0415

    log.configure()
    with errors_in_one_line("zerowake", BadConfig, ClusterError, CannotListen, BadCertificate):
        uvloop.run(run_serve(serve_config.load(file)))


@app.command()
def status(
    state: Annotated[
        Path, typer.Option(help="State folder of `zerowake up`.", envvar="ZEROWAKE_STATE", resolve_path=True)
    ] = _DEFAULT_STATE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows models, replicas, held requests and the last activations with their phases."""
    found = _ask(state, "")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)


@app.command()
def plan(
    state: State = None,
    why: Annotated[str, typer.Option(metavar="MODEL", help="Every term of this model's plan.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="What would be done at this moment. Nothing is done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows what stands where and why, what is under way, and what is put off until when."""
    what = f"plan/{quote(why, safe='')}" if why else "plan"
    found = _ask_any(state, what, "plan")
    if "unknown" in found:
        known = f"there are: {', '.join(found['known'])}" if found["known"] else "none is"
        typer.secho(f"zerowake: no model {found['unknown']!r} is declared; {known}", err=True, fg="red")
        raise typer.Exit(1)
    if dry_run:
        found = {key: found[key] for key in ("missing", "would_do", "would_move_ahead")}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif why and not dry_run:
        plan_shown.show_why(tables.console(), found)
    else:
        plan_shown.show(tables.console(), found, dry_run=dry_run)


@app.command()
def trace(
    activation: Annotated[str, typer.Argument(metavar="ID", help="Of a scale-up, or how its id begins; the last one unless given.")] = LAST,
    state: State = None,
    output: Output = Format.TEXT,
) -> None:
    """Shows where the time of one scale-up went. Its id is in the log, in `zerowake status` and in its answers' X-Zerowake-Activation."""
    found = _ask_any(state, f"trace/{quote(activation, safe='')}", "trace")
    if known := found.get("known"):
        which = f"{len(known)} begin with" if any(each.startswith(activation) for each in known) else "none is"
        fault = f"of the scale-ups {which} {activation!r}; there are: {', '.join(known)}"
    elif known is not None:
        fault = "there was no scale-up so far"
    elif output is Format.TEXT:
        return waterfall_shown.show(tables.console(), as_activation(found))
    else:
        return typer.echo(json.dumps(found, indent=2) if output is Format.JSON else yaml.safe_dump(found, sort_keys=False).rstrip())
    typer.secho(f"zerowake: {fault}", err=True, fg="red")
    raise typer.Exit(1)


@app.command()
def simulate(
    file: Annotated[Path, typer.Argument(help="YAML with nodes, models, rates and a trace.", readable=False)],
    policy: Annotated[list[str] | None, typer.Option(help="One policy; may be given again. All of them unless given.")] = None,
    sweep: Annotated[str, typer.Option(help="Host memory in place of the file's, one run each: 5%,10%,20% or 100GB,200GB.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows what policies of staging would make of a trace: seconds to the first byte, and what they cost. Nothing is served."""
    # Not above: `zerowake status` needs no numpy.
    from scaler.simulate import comparison, shown  # noqa: PLC0415
    from scaler.simulate.scenario import load as load_scenario  # noqa: PLC0415
    from scaler.simulate.trace import BadTrace  # noqa: PLC0415

    with errors_in_one_line("zerowake", BadConfig, BadTrace, comparison.BadRequest):
        found = comparison.run(load_scenario(file), policy or [], [each for each in sweep.split(",") if each])
    if as_json:
        typer.echo(json.dumps(shown.as_json(found), indent=2))
    else:
        tables.console().print(shown.as_table(found))


def _ask_any(state: Path | None, what: str, command: str) -> Any:
    """As `_ask`, of the scaler in this pod where no folder is named and none is served from."""
    in_pod = state is None and not socket_of(_DEFAULT_STATE).exists()
    return (_of_scaler(what) if in_pod else None) or _ask(state or _DEFAULT_STATE, what, _ON_KUBERNETES + command)


def _ask(state: Path, what: str, hint: str = "") -> Any:
    """Of the scaler that runs with this state folder. Raises: typer.Exit: none does."""
    try:
        return asyncio.run(_fetch(socket_of(state), what))
    except (aiohttp.ClientError, OSError, ValueError) as error:
        why = described(getattr(error, "os_error", error))
        typer.secho(
            f"zerowake: nothing answers on {socket_of(state)} ({why}); is `zerowake up` running with this --state?{hint}",
            err=True,
            fg="red",
        )
        raise typer.Exit(1) from None


def _of_scaler(what: str) -> Any:
    """Of the `zerowake serve` in this pod; None: there is none."""
    try:
        return asyncio.run(_fetch(SCALER_SOCKET, what))
    except (aiohttp.ClientError, OSError, ValueError):
        return None


async def _fetch(path: Path | str, what: str) -> Any:
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)), timeout=aiohttp.ClientTimeout(total=5)) as session,
        session.get(f"http://zerowake/{what}") as response,
    ):
        return await response.json()


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.1f} GiB"


def _of(size: int | None, limit: int | None) -> str:
    return _gib(size) if limit is None else f"{_gib(size)} of {_gib(limit)}"


def _print(found: Any) -> None:
    console = tables.console()
    models = tables.table("MODEL", "SNAPSHOT", "RUNG", "WANTED", "READY", "HELD", "IN FLIGHT", "NOTE")
    for each in found["models"]:
        numbers = [str(each[key]) for key in ("wanted", "ready", "held", "in_flight")]
        note = each["failure"] or each["unusable"] or each["refused"]
        rung = each["rung"] + (f" (pinned: {each['pinned']})" if each["pinned"].replace("absent", "").strip(", ") else "")
        models.add_row(each["name"], each["snapshot"] or "-", rung or "-", *numbers, note)
    console.print(models)
    _print_asked(console, found["models"])
    nodes = tables.table("NODE", "MEMORY FREE", "IMAGES", "GPU", "GPU FREE", "GPUMEM", "PARKED", "OTHERS")
    for each in found["nodes"]:
        memory = (
            f"{_gib(each['memory_free_bytes'])} of {_gib(each['memory_total_bytes'])}",
            _of(each["staged_bytes"], each["staged_limit_bytes"]),
        )
        for number, gpu in enumerate(each["gpus"] or [None]):
            has = [_gib(gpu[key]) for key in ("unused_bytes", "pool_bytes", "parked_bytes", "others_bytes")] if gpu else []
            nodes.add_row(*((each["name"], *memory) if not number else ("", "", "")), *([gpu["model"] or gpu["uuid"], *has] if gpu else []))
    console.print()
    console.print(nodes)
    moving = tables.table("ON ITS WAY", "NODE", "TO", "DONE")
    sources = tables.table("SOURCE", "NODE", "RATE", "NOTE")
    for each in found["nodes"]:
        for way in each["transfers"]:
            done = f"{_gib(way['done_bytes'])} of {_gib(way['total_bytes'])}"
            moving.add_row(way["snapshot"], each["name"], way["rung"], done)
        for source in each["sources"]:
            sources.add_row(source["name"], each["name"], f"{source['rate'] / 1e6:.0f} MB/s" if source["rate"] else "-", source["fault"])
    for table in (moving, sources):
        if table.row_count:
            console.print()
            console.print(table)
    if found["replicas"]:
        replicas = tables.table("REPLICA", "NODE", "ORIGIN", "IN FLIGHT", "NOTE")
        for each in found["replicas"]:
            replicas.add_row(each["id"], each["node"], each["origin"], str(each["in_flight"]), each["detail"])
        console.print()
        console.print(replicas)
    if found["activations"]:
        last = tables.table("ACTIVATION", "MODEL", "AT", "OUTCOME", "ORIGIN", "SECONDS", "PHASES (ms)")
        for each in found["activations"]:
            at = datetime.datetime.fromtimestamp(each["began"], datetime.UTC).astimezone().strftime("%H:%M:%S")
            phases = " ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in each["phases"].items())
            how = each["outcome"], each["origin"] or "-"
            last.add_row(each["id"], each["model"], at, *how, f"{each['seconds']:.3f}", phases or each["reason"])
        console.print()
        console.print(last)


def _print_asked(console: Console, models: Any) -> None:
    """Where they are asked for past the gateway."""
    asked = tables.table("ASKED FOR BY", "MODEL", "PENDING", "REPLICAS", "AGE", "NOTE")
    for each in models:
        for source in each["sources"]:
            known = source["pending"] is not None
            counts = (str(source["pending"]), str(source["replicas"] or "-")) if known else ("unknown", "unknown")
            age = "-" if source["age_seconds"] is None else f"{source['age_seconds']:.0f} s"
            asked.add_row(f"{source['name']}: {source['of']}", each["name"], *counts, age, source["fault"])
    if asked.row_count:
        console.print()
        console.print(asked)
