"""Real engines, each started once."""

import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ENGINES = Path(__file__).parents[2] / "deploy" / "demo"
START_SECONDS = 120  # on a machine that does something else besides


@dataclass(frozen=True)
class Served:
    url: str
    pid: int


@contextmanager
def started(program: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """Runs an engine on a free port from when it listens until the block ends."""
    command = [sys.executable, str(ENGINES / program), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                assert ready.select(START_SECONDS), f"{program} did not listen within {START_SECONDS} s"
            line = process.stdout.readline()
            assert line.startswith("serving on "), f"{program} ended with {process.wait()}"
            yield Served(line.split()[-1], process.pid)
        finally:
            process.terminate()
            assert process.wait(30) == 0, f"{program} did not end well"


@pytest.fixture(scope="session")
def chat() -> Iterator[Served]:
    with started("chat.py") as served:
        yield served


@pytest.fixture(scope="session")
def embeddings() -> Iterator[Served]:
    with started("embeddings.py") as served:
        yield served
