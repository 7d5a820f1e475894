"""The demo's engines, each in a process of its own."""

import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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


def assert_can_be_dumped(pid: int) -> None:
    """Nothing that CRIU refuses: an io_uring, a lock, a file that is written to, a connection to somebody else."""
    kinds = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    assert not [kind for kind in kinds if "io_uring" in kind]
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    assert not [fields for fields in locks if str(pid) in fields]
    connected = [line for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "01"]
    ours = {kind[8:-1] for kind in kinds if kind.startswith("socket:[")}
    assert not [line for line in connected if line.split()[9] in ours]
