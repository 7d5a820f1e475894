"""Where gRPC servers listen, and what is said when they cannot."""

import os
import re
from pathlib import Path

import grpc
import pytest

from tests.worlds.exhausted import no_threads
from zerowake_shared.address import Address
from zerowake_shared.listening import CannotListen, listen


def server() -> grpc.aio.Server:
    return grpc.aio.server(options=[("grpc.so_reuseport", 0)])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_free_port_is_found(host: str) -> None:
    bound = listen(server(), str(Address(host, 0)), "the test")
    assert Address.parse(bound).host == host and Address.parse(bound).port > 0


async def test_a_socket_keeps_its_path(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'a.sock'}"
    assert listen(server(), address, "the test") == address


async def test_an_address_that_is_taken_is_named_with_who_wanted_it() -> None:
    first = server()
    bound = listen(first, "127.0.0.1:0", "the first")
    has = rf"the port is in use by pid {os.getpid()} \(.+\); stop that, or choose another"
    with pytest.raises(CannotListen, match=rf"^the second cannot listen on {re.escape(bound)}: {has}$"):
        listen(server(), bound, "the second")


async def test_a_process_that_may_start_no_threads_says_so_and_does_not_hang() -> None:
    here = server()
    said = r"^the test cannot serve: that takes \d+ threads, and this process may start 0: raise its limit of processes"
    with no_threads(), pytest.raises(CannotListen, match=said):
        listen(here, "127.0.0.1:0", "the test")
    assert listen(here, "127.0.0.1:0", "the test")


async def test_an_address_that_is_none(tmp_path: Path) -> None:
    for address in ("nowhere", "not.a.host.invalid:80", f"unix:{tmp_path / 'no-folder' / 'a.sock'}"):
        with pytest.raises(CannotListen, match=re.escape(address)):
            listen(server(), address, "the test")
