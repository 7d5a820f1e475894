"""What cannot be started is said before it is tried; and the kernel agrees with the bounds."""

from __future__ import annotations

import os
import subprocess

import pytest

from zerowake_shared.command_limits import flaw_of_command, flaw_of_environment

LONGEST = 131071


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["python", "x.py"], ""),
        (["python", ""], ""),
        (["python", "x" * LONGEST], ""),
        (["python", "x" * (LONGEST + 1)], "word 2 has 131072 bytes"),
        (["python", "é" * 70_000], "word 2 has 140000 bytes"),
        ([""], "the program's name is empty"),
        ([" "], "the program's name is empty"),
        (["python", "a\0b"], "word 2 has a NUL character"),
        (["python", os.fsdecode(b"\xff")], "word 2 is no text in UTF-8"),
    ],
)
def test_commands(command: list[str], why: str) -> None:
    found = flaw_of_command(command)
    assert found.startswith(why) and bool(found) == bool(why)


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"A": "1", "": "2"}, "'' cannot be the name of a variable"),
        ({"A=B": "1"}, "'A=B' cannot be the name of a variable"),
        ({"A": "x\0"}, "A has a NUL character"),
        ({"A": os.fsdecode(b"\xff")}, "A is no text in UTF-8"),
        ({"A": "x" * LONGEST}, "A has 131073 bytes"),
        ({f"A{each}": "x" * 100_000 for each in range(30)}, "variables and command have 3000"),
    ],
)
def test_environments(env: dict[str, str], why: str) -> None:
    assert flaw_of_environment(env).startswith(why)


def test_what_fits_can_be_started() -> None:
    env = {"A": "x" * (LONGEST - 2)} | {f"B{each}": "x" * 100_000 for each in range(18)}
    command = ["/bin/true", "x" * LONGEST]
    assert flaw_of_command(command) == flaw_of_environment({**env, "A": "x"}, command[:1]) == ""
    subprocess.run(["/bin/true"], env=env, check=True)
    subprocess.run(command, env={}, check=True)
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run(["/bin/true"], env={"A": "x" * (LONGEST - 1)}, check=True)
