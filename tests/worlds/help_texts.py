"""Every command's `--help`, as a user sees it on a terminal of a hundred columns: `python -m tests.worlds.help_texts` prints them all."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

os.environ |= {"TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}  # read as typer is imported


def paths(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Of a command and all below it, the hidden too."""
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from paths(each, (*path, name))


def all_of(app: Any, program: str) -> Iterator[str]:
    """One text for each command of the program."""
    from typer.main import get_command  # noqa: PLC0415

    command = get_command(app)
    for path in sorted(paths(command, (program,))):
        shown = io.StringIO()
        with redirect_stdout(shown):
            code = command.main([*path[1:], "--help"], prog_name=program, standalone_mode=False)
        assert not code, (path, code)
        lines = (line.rstrip() for line in shown.getvalue().strip().splitlines())
        yield f"$ {' '.join(path)} --help\n" + "\n".join(lines) + "\n"


def main() -> None:
    from gpumem.programs.commands import app as gpumem  # noqa: PLC0415
    from scaler.programs import cli  # noqa: PLC0415

    for missing in cli.collect(cli.app):
        sys.exit(missing)
    sys.stdout.write("\n".join([*all_of(cli.app, "zerowake"), *all_of(gpumem, "gpumem")]))


if __name__ == "__main__":
    main()
