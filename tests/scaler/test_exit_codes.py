"""Exit codes: 0 a command did what was asked, 1 it failed and says why and what to do, 2 it was asked wrongly. Never a traceback."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from scaler.programs import cli


async def run(*arguments: str, by: Sequence[str] = ()) -> tuple[int | None, str]:
    """The exit code, and what was said on standard error but for log lines. by: the program that starts it."""
    process = await asyncio.create_subprocess_exec(
        *(*by, sys.executable, "-m", "scaler.programs.cli", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        stdin=asyncio.subprocess.DEVNULL,
    )
    _, err = await process.communicate()
    return process.returncode, "\n".join(line for line in err.decode().splitlines() if not line.startswith('{"time"'))


def below(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, each in getattr(command, "commands", {}).items():
        yield (*path, name)
        yield from below(each, (*path, name))


def test_a_command_that_is_asked_wrongly_says_so_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of them, for an option that it does not have."""
    app = typer.Typer()
    assert cli.collect(app) == []
    program = get_command(app)
    commands = list(below(program))
    assert len(commands) > 25
    for path in commands:
        with pytest.raises(SystemExit) as ended:
            program.main([*path, "--there-is-no-such-option"], prog_name="zerowake")
        said = capsys.readouterr().err
        assert (path, ended.value.code) == (path, 2)
        assert "--there-is-no-such-option" in said or "Missing" in said, said


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no file": (["up", "{tmp}/none.yaml"], "none.yaml cannot be read: No such file or directory"),
    "no settings": (["serve", "{tmp}/torn.yaml"], "torn.yaml, line 2 is no YAML"),
    "nobody answers": (["status", "--state", "{tmp}/s"], "is `zerowake up` running with this --state?"),
    "no agent": (["standby", "chat", "--state", "{tmp}/s"], "start `zerowake up` or `zerowake agent`"),
    "no snapshot": (["snapshot", "show", "chat", "--state", "{tmp}/s"], "`zerowake snapshot create` makes one"),
    "no store": (["snapshot", "pull", "chat", "--from", "ftp://x", "--state", "{tmp}/s"], "is no URL of a store: file:///a/folder"),
    "no key": (["key", "trust", "{tmp}/torn.yaml", "--state", "{tmp}/s"], "give a file of another node's `trusted` folder"),
    "no gpumem": (["gpumem", "status", "--socket", "{tmp}/g.sock"], "start one with `gpumem serve --socket"),
    "no folder": (["bundle", "--machine", "--to", "{tmp}/none/b.tar.gz", "--state", "{tmp}/s"], "none/b.tar.gz: No such file or directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_is_told_on_one_screen_with_1(mistake: str, tmp_path: Path) -> None:
    (tmp_path / "torn.yaml").write_text("models: [\n")
    words, says = MISTAKES[mistake]
    code, said = await run(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert code == 1, said
    assert says in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 3, said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give rights up")
async def test_a_folder_that_is_somebody_else_s_is_told_with_2(tmp_path: Path) -> None:
    theirs = tmp_path / "s"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 65534, 65534)
    without_rights = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    code, said = await run("snapshot", "list", "--state", str(theirs), by=without_rights)
    assert (code, "not readable" in " ".join(said.split()), "Traceback" in said) == (2, True, False), said


async def test_what_is_asked_well_ends_with_0(tmp_path: Path) -> None:
    assert await run("snapshot", "list", "--state", str(tmp_path / "s")) == (0, "")
