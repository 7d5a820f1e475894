"""What the commands have in common: the options that most of them take, and how their failures are told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import grpc
import typer

from restore_agent.errors import REASON, AgentError
from restore_agent.snapshots.catalog import NotFound
from restore_agent.snapshots.store import NameTaken
from restore_agent.transfer.finding import NotElsewhere
from zerowake_shared.listening import CannotListen
from zerowake_shared.one_line import errors_in_one_line
from zerowake_shared.state_folder import FolderInUse, UnusableFolder
from zerowake_shared.tls import BadCertificate

State = Annotated[Path, typer.Option(help="The agent's folder: snapshots and its socket.", envvar="ZEROWAKE_STATE", resolve_path=True)]
Keys = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the keys that snapshots are signed by; keys in the state folder if not given.",
        envvar="ZEROWAKE_KEYS",
        resolve_path=True,
    ),
]
Namespace = Annotated[str, typer.Option(help="Namespace of the snapshot.")]
Name = Annotated[str, typer.Argument(help="Name of the snapshot.")]

# By an error's reason. What an agent says is the same on Kubernetes, where none of these commands is the way out.
_REMEDIES = {
    NotFound.reason: "`zerowake snapshot create` makes one",
    NotElsewhere.reason: "`zerowake snapshot push` puts one there",
    NameTaken.reason: "choose another name, --replace it, or `zerowake snapshot rm` it",
}


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Every failure that has a name is told on stderr, with exit code 1: in one line, below which stands what an engine printed."""
    with errors_in_one_line("zerowake", AgentError, BadCertificate, CannotListen, FolderInUse, UnusableFolder):
        try:
            yield
        except (grpc.aio.AioRpcError, AgentError) as error:
            typer.secho(f"zerowake: {_with_remedy(error)}", err=True, fg="red")
            raise typer.Exit(1) from None


def _with_remedy(error: grpc.aio.AioRpcError | AgentError) -> str:
    """What happened, here or in an agent that was asked, and what to do where a command of ours does it."""
    if isinstance(error, AgentError):
        said, reason = str(error), error.reason
    else:
        trailing: dict[str, object] = dict(error.trailing_metadata() or ())
        said, reason = error.details() or error.code().name, str(trailing.get(REASON, ""))
    return f"{said}; {_REMEDIES[reason]}" if reason in _REMEDIES else said
