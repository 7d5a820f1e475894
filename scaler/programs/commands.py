"""`zerowake up`, `zerowake serve`, `zerowake status`, `zerowake plan`, `zerowake trace` and `zerowake simulate`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
import uvloop

from scaler.programs import asking, watching
from scaler.view import plan_shown, status_shown, waterfall_shown
from scaler.view.state import LAST, State, as_activation, decoded
from scaler.view.state import as_json as as_json_types
from zerowake_shared import bars, log, tables
from zerowake_shared.kubernetes.errors import ClusterError
from zerowake_shared.listening import CannotListen
from zerowake_shared.one_line import errors_in_one_line
from zerowake_shared.output import Format, Output, printed
from zerowake_shared.state_folder import FolderInUse, UnusableFolder
from zerowake_shared.tls import BadCertificate

app = typer.Typer(no_args_is_help=True)
_ON_KUBERNETES = " On Kubernetes ask in a scaler's pod: kubectl exec -n NAMESPACE deploy/zerowake-scaler -- zerowake {}"


@app.command()
def up(file: Annotated[Path, typer.Argument(help="YAML that names the models.", readable=False)]) -> None:
    """Serves models on this machine: gateway, scaler, autoscaler and restore agent, until stopped."""
    # Not above: what serves takes longer to import than `zerowake status` to answer. Each agent is a `zerowake`, too.
    from scaler.local.config import BadConfig, load  # noqa: PLC0415
    from scaler.programs.up import AgentFailed  # noqa: PLC0415
    from scaler.programs.up import up as run_up  # noqa: PLC0415

    log.configure()
    with errors_in_one_line("zerowake", BadConfig, CannotListen, BadCertificate, FolderInUse, UnusableFolder, AgentFailed):
        uvloop.run(run_up(load(file)))


@app.command()
def serve(file: Annotated[Path, typer.Argument(help="YAML with addresses and certificates; the chart writes it.", readable=False)]) -> None:
    """Serves the models of a Kubernetes cluster: gateway, KEDA's scaler, controller and webhook, beside other replicas of it."""
    from scaler.local.config import BadConfig  # noqa: PLC0415
    from scaler.programs import serve_config  # noqa: PLC0415
    from scaler.programs.serve import serve as run_serve  # noqa: PLC0415

    log.configure()
    with errors_in_one_line("zerowake", BadConfig, ClusterError, CannotListen, BadCertificate):
        uvloop.run(run_serve(serve_config.load(file)))


@app.command()
def status(
    state: asking.State = None,
    output: Output = Format.TEXT,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on, and show what changes; in a pipe, one line for each change.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON as earlier versions had it; `-o json` has all of it.")] = False,
) -> None:
    """Shows models, replicas, held requests and the last activations with their phases. Exits with 1 where no scaler answers."""
    if watch:
        if as_json or output is not Format.TEXT:
            raise typer.BadParameter("--watch shows text: without -o and --json")
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(watching.watch(lambda: _state(state), tables.console()))
        return
    if as_json:
        typer.echo(json.dumps(json.loads(asyncio.run(asking.ask(state, "", _ON_KUBERNETES.format("status -o json")))), indent=2))
        return
    found = asyncio.run(_state(state))
    if output is Format.TEXT:
        tables.console().print(status_shown.view(found))
    else:
        printed(as_json_types(found), output)


async def _state(folder: Path | None) -> State:
    hint = "" if folder else _ON_KUBERNETES.format("status")
    return decoded(await asking.ask(folder, "state", hint))


@app.command()
def plan(
    state: asking.State = None,
    why: Annotated[str, typer.Option(metavar="MODEL", help="Every term of this model's plan.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="What would be done at this moment. Nothing is done.")] = False,
    output: Output = Format.TEXT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: as `-o json`.")] = False,
) -> None:
    """Shows what stands where and why, what is under way, and what is put off until when. Exits with 1 where no scaler answers."""
    what = f"plan/{quote(why, safe='')}" if why else "plan"
    found = json.loads(asyncio.run(asking.ask(state, what, _ON_KUBERNETES.format("plan"))))
    if "unknown" in found:
        known = f"there are: {', '.join(found['known'])}" if found["known"] else "none is"
        typer.secho(f"zerowake: no model {found['unknown']!r} is declared; {known}", err=True, fg="red")
        raise typer.Exit(1)
    if dry_run:
        found = {key: found[key] for key in ("missing", "would_do", "would_move_ahead")}
    output = Format.JSON if as_json else output
    if output is not Format.TEXT:
        printed(found, output)
    elif why and not dry_run:
        plan_shown.show_why(tables.console(), found)
    else:
        plan_shown.show(tables.console(), found, dry_run=dry_run)


@app.command()
def trace(
    activation: Annotated[str, typer.Argument(metavar="ID", help="Of a scale-up, or how its id begins; the last one unless given.")] = LAST,
    state: asking.State = None,
    output: Output = Format.TEXT,
) -> None:
    """Shows where the time of one scale-up went. Its id is in the log, in `zerowake status` and in its answers' X-Zerowake-Activation."""
    found = json.loads(asyncio.run(asking.ask(state, f"trace/{quote(activation, safe='')}", _ON_KUBERNETES.format("trace"))))
    if known := found.get("known"):
        which = f"{len(known)} begin with" if any(each.startswith(activation) for each in known) else "none is"
        fault = f"of the scale-ups {which} {activation!r}; there are: {', '.join(known)}"
    elif known is not None:
        fault = "there was no scale-up so far"
    elif output is Format.TEXT:
        return waterfall_shown.show(tables.console(), as_activation(found))
    else:
        return printed(found, output)
    typer.secho(f"zerowake: {fault}", err=True, fg="red")
    raise typer.Exit(1)


@app.command()
def simulate(
    file: Annotated[Path, typer.Argument(help="YAML with nodes, models, rates and a trace.", readable=False)],
    policy: Annotated[list[str] | None, typer.Option(help="One policy; may be given again. All of them unless given.")] = None,
    sweep: Annotated[str, typer.Option(help="Host memory in place of the file's, one run each: 5%,10%,20% or 100GB,200GB.")] = "",
    output: Output = Format.TEXT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: as `-o json`.")] = False,
) -> None:
    """Shows what policies of staging would make of a trace: seconds to the first byte, and what they cost. Nothing is served."""
    # Not above: `zerowake status` needs no numpy.
    from scaler.local.config import BadConfig  # noqa: PLC0415
    from scaler.simulate import comparison, shown  # noqa: PLC0415
    from scaler.simulate.scenario import load as load_scenario  # noqa: PLC0415
    from scaler.simulate.trace import BadTrace  # noqa: PLC0415

    with errors_in_one_line("zerowake", BadConfig, BadTrace, comparison.BadRequest), bars.of_shares() as bar:
        found = comparison.run(load_scenario(file), policy or [], [each for each in sweep.split(",") if each], bar.show)
    output = Format.JSON if as_json else output
    if output is not Format.TEXT:
        printed(shown.as_json(found), output)
    else:
        tables.console().print(shown.as_table(found))
