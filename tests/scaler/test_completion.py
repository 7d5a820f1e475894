"""The scripts of `zerowake completion`, in the shells that they are for."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worlds.command import zerowake

CASES = [
    ("zerowake sna", {"snapshot"}),
    ("zerowake snapshot cr", {"create"}),
    ("zerowake snapshot show chat --na", {"--namespace"}),
    ("zerowake doctor -o ", {"text", "json", "yaml"}),
    ("zerowake doctor --output y", {"yaml"}),
    ("zerowake completion ", {"bash", "zsh", "fish"}),
    ("zerowake gpumem se", {"serve"}),
]


@pytest.fixture
async def script(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Of the shell that the test is named after."""
    shell = request.node.originalname.rpartition("_")[2]
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}: `make test` installs it, or apt-get install {shell}")
    path = tmp_path / f"script.{shell}"
    path.write_text(await zerowake("completion", shell))
    return path


def test_commands_options_and_values_in_bash(script: Path) -> None:
    ask = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _zerowake; echo "${COMPREPLY[@]}"'
    for line, expected in [*CASES, ("zerowake up ", set()), ("zerowake snapshot create x -- zerowake sna", set())]:
        words = " ".join(f"'{word}'" for word in line.split(" "))
        done = subprocess.run(["bash", "-c", f"source {script}; COMP_WORDS=({words}); {ask}"], capture_output=True, text=True, check=True)
        assert (line, set(done.stdout.split())) == (line, expected), done.stderr


def test_commands_options_and_values_in_fish(script: Path) -> None:
    for line, expected in CASES:
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"], capture_output=True, text=True, check=True
        )
        assert expected <= {each.partition("\t")[0] for each in done.stdout.splitlines()}, (line, done.stdout, done.stderr)


@pytest.fixture
def typed(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Types into a zsh of its own, and waits for what it writes then."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "dumb", "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}
        os.execvp("zsh", ["zsh", "-f", "-i"])

    def type_(keys: str, expected: str) -> None:
        os.write(terminal, keys.encode())
        shown, end = "", time.monotonic() + 60
        while expected not in shown:
            assert time.monotonic() < end, (keys, shown)
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")

    try:
        yield type_
    finally:
        os.close(terminal)  # which it takes for a hang-up
        os.waitpid(pid, 0)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh: `make test` installs it, or apt-get install zsh")
def test_commands_options_and_values_in_zsh(script: Path, typed: Callable[[str, str], None]) -> None:
    typed(f"autoload -Uz compinit; compinit -u -D; source {script}; echo is''ready\n", "isready\r")
    typed("zerowake snapshot cr\t", "snapshot create ")
    typed("\x15zerowake doctor -o js\t", "-o json ")
    typed("\x15zerowake snapshot show chat --na\t", "--namespace ")
