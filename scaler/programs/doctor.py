"""`zerowake doctor`: makes the checks that every room brings (zerowake_shared/checkup.py), and shows what they found."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from zerowake_shared import bars, tables
from zerowake_shared.checkup import GROUP, Check, Line, Outcome, Subject, examine, fails, warning
from zerowake_shared.output import Format, Output, printed
from zerowake_shared.server_extra import INSTALL

app = typer.Typer()
DEFAULT_STATE = Path("/var/lib/zerowake")
DEFAULT_GPUMEM = Path("/run/gpumem/gpumem.sock")
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_COLOURS = {Outcome.OK: "green", Outcome.WARNING: "yellow", Outcome.FAILS: "red"}

File = Annotated[Path | None, typer.Argument(help="A zerowake.yaml to look at, too.", metavar="[zerowake.yaml]", readable=False)]
State = Annotated[
    Path | None,
    typer.Option(
        help="State folder; unless given, what zerowake.yaml names, or /var/lib/zerowake.",
        envvar="ZEROWAKE_STATE",
        resolve_path=True,
    ),
]
Gpumem = Annotated[Path, typer.Option(help="Socket of gpumem.", envvar="GPUMEM_SOCKET", resolve_path=True)]
Keys = Annotated[
    Path | None,
    typer.Option(help="Folder of the keys; keys in the state folder if not given.", envvar="ZEROWAKE_KEYS", resolve_path=True),
]
Kubernetes = Annotated[
    bool | None,
    typer.Option(
        "--kubernetes/--machine",
        help="Look at the cluster (this pod's, or KUBECONFIG's), or at this machine, which is the default outside of pods.",
    ),
]
InNamespace = Annotated[str, typer.Option(help="Namespace on Kubernetes of zerowake itself; unless given, this pod's, or zerowake.")]


@app.command()
def doctor(
    file: File = None,
    state: State = None,
    gpumem: Gpumem = DEFAULT_GPUMEM,
    keys: Keys = None,
    kubernetes: Kubernetes = None,
    namespace: InNamespace = "",
    output: Output = Format.TEXT,
) -> None:
    """Shows what this machine or cluster can do, and how to mend what it cannot. Exits with 1 where something fails.

    Nothing is changed: what is tried out is a file of the state folder, which is removed, and a sandbox.
    """
    logging.getLogger().addHandler(logging.NullHandler())  # what is tried is told in its line
    subject = subject_of(file, state, gpumem, keys, namespace)
    with bars.waiting("looking at what is there"):
        lines = asyncio.run(examined(subject, is_cluster(kubernetes)))
    if output is Format.TEXT:
        _print(lines)
    else:
        found = {"ok": not any(_fails(each) for each in lines), "checks": [each.as_json() for each in lines]}
        printed(found, output)
    if any(_fails(each) for each in lines):
        raise typer.Exit(1)


def is_cluster(wanted: bool | None) -> bool:
    """Whether the cluster is meant: as was said, or as in a pod."""
    return "KUBERNETES_SERVICE_HOST" in os.environ if wanted is None else wanted


def subject_of(file: Path | None, state: Path | None, gpumem: Path, keys: Path | None, namespace: str) -> Subject:
    """What was not said is as the file says, if it can be read."""
    store = ""
    if file:
        from scaler.local.config import BadConfig, load  # noqa: PLC0415  # which takes longer to import than most checks

        try:
            config = load(file)
            state, store = state or config.state, config.store or ""
        except BadConfig:
            pass  # a check tells
    if not namespace:
        with contextlib.suppress(OSError):
            namespace = _POD_NAMESPACE.read_text().strip()
    return Subject(state or DEFAULT_STATE, gpumem, keys, file, store, namespace or "zerowake")


async def examined(subject: Subject, cluster: bool) -> list[Line]:
    """What all checks of the machine, or of the cluster, found. A room that cannot be loaded is a line of its own."""
    if cluster:  # takes longer to import than a check may take on a machine that is busy
        importlib.import_module("zerowake_shared.kubernetes.cluster")
    checks: list[Check] = []
    missing = []
    for entry in sorted(entry_points(group=GROUP), key=lambda found: found.name == "scaler", reverse=True):
        try:
            checks += [check for check in entry.load() if check.of_cluster in (cluster, None)]
        except (ImportError, AttributeError) as error:
            missing.append(Line(entry.name, fails(f"its checks cannot be loaded ({error})", f"install all of it: {INSTALL}")))
    if not checks:
        missing.append(Line("checks", warning("there are none", f"install zerowake again: {INSTALL}")))
    return await examine(checks, subject) + missing


def _fails(line: Line) -> bool:
    return line.finding.outcome is Outcome.FAILS


def _print(lines: list[Line]) -> None:
    console = tables.console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for line in lines:
        found = line.finding
        name = f"{line.check}: {found.of}" if found.of else line.check
        table.add_row(Text(found.outcome.value, style=_COLOURS[found.outcome]), name, found.found)
        if found.remedy:
            table.add_row("", "", Text(f"→ {found.remedy}", style="bold" if _fails(line) else ""))
    console.print(table)
    counts: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
    for line in lines:
        counts[line.finding.outcome] += 1
    console.print(f"\n{counts[Outcome.OK]} ok, {counts[Outcome.WARNING]} warnings, {counts[Outcome.FAILS]} fail")
