"""`zerowake bundle`: one file for a bug report, of the parts that every room brings (zerowake_shared/bundle.py), secrets left out."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from scaler.programs.doctor import (
    DEFAULT_GPUMEM,
    File,
    Gpumem,
    InNamespace,
    Keys,
    Kubernetes,
    State,
    examined,
    is_cluster,
    subject_of,
)
from zerowake_shared import bars, tables
from zerowake_shared.bundle import GROUP, Part, gathered, write
from zerowake_shared.checkup import Subject
from zerowake_shared.clock import SYSTEM_CLOCK
from zerowake_shared.one_line import errors_in_one_line
from zerowake_shared.secrets_left_out import Scrubber

app = typer.Typer()


@app.command()
def bundle(
    file: File = None,
    to: Annotated[Path | None, typer.Option(help="The file to write; unless given, one in this folder, named by the time.")] = None,
    state: State = None,
    gpumem: Gpumem = DEFAULT_GPUMEM,
    keys: Keys = None,
    kubernetes: Kubernetes = None,
    namespace: InNamespace = "",
) -> None:
    """Makes one .tar.gz for a bug report: versions, what `zerowake doctor` says, settings, state, metrics and logs. Secrets are left out.

    Values of environments, credentials, tokens and keys go, their names stay. Logs may hold what your engines print: look into the file
    before you give it away.
    """
    logging.getLogger().addHandler(logging.NullHandler())
    path = to or Path(f"zerowake-{datetime.datetime.fromtimestamp(SYSTEM_CLOCK.wall(), datetime.UTC):%Y%m%dT%H%M%SZ}.tar.gz")
    with errors_in_one_line("zerowake"):
        subject = subject_of(file, state, gpumem, keys, namespace)
        with bars.waiting("gathering what there is"):
            found, missing = asyncio.run(_gathered(subject, is_cluster(kubernetes)))
            written = write(path, found, _scrubber(subject))
    table = tables.table("FILE", "BYTES")
    for name, size in written:
        table.add_row(name, str(size))
    console = tables.console()
    console.print(table)
    for each in missing:
        console.print(f"left out: {each}")
    console.print(f"\nwritten to {path.resolve()}, for its owner alone; secrets are left out, and logs may hold what your engines print")


async def _gathered(subject: Subject, cluster: bool) -> tuple[dict[str, object], list[str]]:
    parts: list[Part] = []
    missing = []
    for entry in entry_points(group=GROUP):
        try:
            parts += [part for part in entry.load() if part.of_cluster is cluster]
        except (ImportError, AttributeError) as error:
            missing.append(f"{entry.name}: {error}")
    (found, not_had), lines = await asyncio.gather(gathered(parts, subject), examined(subject, cluster))
    missing += not_had
    found["doctor.json"] = [each.as_json() for each in lines]
    if missing:
        found["missing.json"] = missing
    return found, missing


def _scrubber(subject: Subject) -> Scrubber:
    """It knows what is secret here: variables of this process, keys, and the token that demand is told with."""
    scrubber = Scrubber(os.environ)
    folder = subject.keys or subject.state / "keys"
    for key in (*folder.glob("*.pem"), *folder.glob("**/*.key"), *_token_files(subject)):
        try:
            scrubber.know(key.read_text())
        except (OSError, UnicodeDecodeError):  # another user's; then no part can hold it either
            continue
    return scrubber


def _token_files(subject: Subject) -> list[Path]:
    from scaler.local.config import BadConfig, load  # noqa: PLC0415  # as in doctor.py

    try:
        config = load(subject.file) if subject.file else None
    except BadConfig:
        return []
    return [config.push.token_file] if config and config.push else []
