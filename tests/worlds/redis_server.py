"""Debian's Redis, as a process of its own: in memory alone, with whatever password a test gives it.

The package redis-tools has the server's program, too, under the name of a tool: which of the two it is goes by the name that it is run by.
So no service of the package redis-server begins to run on the machine of whoever runs the tests.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.worlds.ports import free_port
from tests.worlds.waiting import blocking_until


@dataclass
class RedisServer:
    """One that runs, until its process is killed."""

    port: int
    process: subprocess.Popen[bytes]
    password: str = ""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def do(self, *words: str) -> str:
        """What a command is answered."""
        command = [
            "redis-cli",
            "-h",
            self.host,
            "-p",
            str(self.port),
            *(["-a", self.password, "--no-auth-warning"] if self.password else []),
            *words,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


@contextlib.contextmanager
def redis_server(folder: Path, password: str = "", port: int = 0, host: str = "127.0.0.1") -> Iterator[RedisServer]:
    """host: the address that it listens at."""
    program = shutil.which("redis-check-rdb")
    assert program, "redis-check-rdb is missing: `make test` installs it (package redis-tools)"
    port = port or free_port()
    options = {"port": str(port), "bind": host, "save": "", "dir": str(folder), "protected-mode": "no"}
    options |= {"requirepass": password} if password else {}
    command = ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", value))]
    with subprocess.Popen(command, executable=program, stdout=subprocess.DEVNULL) as process:
        made = RedisServer(port, process, password, host)
        try:
            blocking_until(lambda: made.do("ping") == "PONG", "Redis answers", not_yet=(subprocess.CalledProcessError,))
            yield made
        finally:
            process.kill()
