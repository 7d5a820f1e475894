"""The `zerowake` program: one command line, put together from what each room brings.

A room registers a typer app under the entry point group `zerowake.commands`; its commands and groups stand at the top level of `zerowake`.
So no room imports another for the sake of a command line, and a room whose own dependencies are missing takes only its own commands away.
"""

import os
from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from scaler.programs import completion
from zerowake_shared.server_extra import INSTALL

GROUP = "zerowake.commands"

app = typer.Typer(
    name="zerowake",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zerowake {version('zerowake')}")
        raise typer.Exit


@app.callback()
def zerowake(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)] = False,
) -> None:
    """Scales model servers from zero by waking snapshots that already wait on the node.

    A model costs nothing while nobody asks for it. Its first request wakes a snapshot of the running server, which answers in a fraction
    of a second instead of starting again.

    First steps: `zerowake snapshot create --help` takes a snapshot of a server, `zerowake up FILE` serves models on this machine,
    `zerowake status` shows what they are doing.
    """


completion.add_to(app)


def collect(into: typer.Typer) -> list[str]:
    """Adds every room's commands to `into`; returns one line for each room that could not be loaded."""
    missing = []
    for entry in sorted(entry_points(group=GROUP), key=lambda found: found.name):
        try:
            room = entry.load()
        except (ImportError, AttributeError) as error:
            missing.append(f"no commands of {entry.name}: {entry.value} cannot be loaded ({error}); install all of it: {INSTALL}")
        else:
            into.add_typer(room)
    return missing


def main() -> None:
    """Runs `zerowake` with the arguments of this process."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what its C core would write beside the errors that it raises
    # Else it starts threads in a child between fork and exec, of which three in a hundred crashed. It reads this as it is imported.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # Else numpy starts a thread of OpenBLAS for each processor as it is imported. Nothing here has use for them, and where a process may
    # start none it crashes then, before it can say so.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for line in collect(app):
        typer.secho(f"zerowake: {line}", err=True, fg="yellow")
    app()


if __name__ == "__main__":
    main()
