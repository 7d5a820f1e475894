"""What `zerowake doctor` finds of gpumem: a server that runs, none, and one that is gone and has left its socket."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

from gpumem.programs.checks import gpumem
from tests.worlds.gpumem_server import Served
from zerowake_shared.checkup import Outcome, Subject


async def test_what_a_server_holds_is_told(server: Served) -> None:
    host, arena = await gpumem(Subject(Path("/nowhere"), server.socket))
    assert (host.outcome, host.of) == (Outcome.OK, "host")
    assert host.found == "0.2 of 0.2 GiB held, 0.2 GiB of that free"
    assert arena.found == "0.0 of 0.1 GiB used, 0 regions"


async def test_none_is_fine(tmp_path: Path) -> None:
    (finding,) = await gpumem(Subject(Path("/nowhere"), tmp_path / "gpumem.sock"))
    assert (finding.outcome, "not running" in finding.found) == (Outcome.OK, True)


async def test_a_socket_that_nobody_answers_at_is_told() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        path = Path(folder) / "gpumem.sock"
        left.bind(str(path))  # and never listens, as one that was killed
        (finding,) = await gpumem(Subject(Path("/nowhere"), path))
    assert (finding.outcome, f"no gpumem answers at {path}" in finding.found) == (Outcome.FAILS, True)
