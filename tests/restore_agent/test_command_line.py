"""How failures of commands are told: one line, exit code 1, and what to do where a command does it."""

from __future__ import annotations

import grpc
import pytest
import typer

from restore_agent.errors import REASON
from restore_agent.programs.command_line import failures_told
from restore_agent.snapshots.catalog import NotFound
from restore_agent.snapshots.keyring import Untrusted
from restore_agent.snapshots.store import NameTaken


def from_an_agent(details: str, reason: str) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata((REASON, reason)) if reason else grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), metadata, details)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotFound("no snapshot a/b on this node"), "no snapshot a/b on this node; `zerowake snapshot create` makes one"),
        (from_an_agent("no snapshot a/b", "not-found"), "no snapshot a/b; `zerowake snapshot create` makes one"),
        (NameTaken("a/b exists"), "a/b exists; choose another name, --replace it, or `zerowake snapshot rm` it"),
        (Untrusted("it is not signed"), "it is not signed"),
        (from_an_agent("the engine ended", ""), "the engine ended"),
    ],
)
def test_a_failure_is_one_line_with_what_to_do(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit, failures_told():
        raise error
    assert exit.value.exit_code == 1
    assert capsys.readouterr().err == f"zerowake: {said}\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), failures_told():
        raise ZeroDivisionError
