"""Who has a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.worlds.waiting import blocking_until
from zerowake_shared.port_holder import command_of, port_holder


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_whoever_listens_is_found(family: socket.AddressFamily) -> None:
    with socket.socket(family) as listener:
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert port_holder(port) == "", "it is bound only"
        listener.listen()
        assert port_holder(port) == f"pid {os.getpid()} ({command_of(os.getpid())})"
    assert port_holder(port) == ""


def test_a_command_is_told_by_its_program_and_script() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "a" * 200]) as process:
        try:
            blocking_until(lambda: "aaa" in command_of(process.pid))  # it has become that program
            shown = command_of(process.pid)
            assert shown.startswith("python") and "/" not in shown.split()[0] and len(shown) == 60
        finally:
            process.kill()
    assert command_of(process.pid) == "ended"
