"""What an agent's `--renew` gives to programs, without an agent: a control directory, what is laid out, and the words, said by the test."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import zerowake_native

from restore_agent.workload.renewal import ANSWER_DOOR, RESTORE_COMPLETE, VARIABLE, Return

# In the environment: what is preloaded in place of the library, with what it needs before it; sanitized.py has such.
INSTEAD = "ZEROWAKE_TEST_RENEWAL"


class World:
    """A control directory, and what is laid out, with a program's own `sitecustomize` behind it."""

    def __init__(self, folder: Path) -> None:
        self.control, self.laid, self.own = folder / "control", folder / "laid", folder / "own"
        for each in (self.control, self.laid, self.own):
            each.mkdir()
        workload = files("restore_agent.workload")
        for source, target in (("renewal.py", "zerowake_renewal.py"), ("renewal_at_start.py", "sitecustomize.py")):
            (self.laid / target).write_bytes((workload / source).read_bytes())

    def start(self, program: str, **env: str) -> subprocess.Popen[str]:
        """A program of Python's, with Python's part."""
        return self._start([sys.executable, "-c", program], {"PYTHONPATH": f"{self.laid}:{self.own}", **env})

    def start_preloaded(self, command: Sequence[str | Path], **env: str) -> subprocess.Popen[str]:
        """Any program, with the part that is preloaded."""
        return self._start(command, {"LD_PRELOAD": os.environ.get(INSTEAD, str(zerowake_native.RENEWAL)), **env})

    def _start(self, command: Sequence[str | Path], env: dict[str, str]) -> subprocess.Popen[str]:
        variables = {**os.environ, VARIABLE: str(self.control), **env}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)

    def wait(self) -> None:
        """A snapshot is wanted from now on."""
        os.mkfifo(self.control / ANSWER_DOOR)

    def announced(self) -> set[str]:
        return {path.name for path in self.control.glob("renews-*")}

    def restore(self, word: str = RESTORE_COMPLETE) -> None:
        """The agent's word, and its door, which stays open: whoever has looked for the word may not stand there yet."""
        for path in self.control.glob("renews-*"):
            path.unlink()
        (self.control / word).write_text(Return.fresh(5, restored=True).encode())
        self._door = weakref.finalize(self, os.close, os.open(self.control / ANSWER_DOOR, os.O_RDWR | os.O_NONBLOCK))

    def take_back(self) -> None:
        """All that was said since."""
        self._door()
        (self.control / RESTORE_COMPLETE).unlink()
        for path in self.control.glob("renews-*"):
            path.unlink()


def drawing_server(folder: Path) -> Path:
    """drawing_server.c, compiled into that folder."""
    program = folder / "drawing_server"
    subprocess.run(["cc", "-O2", "-o", program, Path(__file__).with_name("drawing_server.c")], check=True)
    return program
