"""Connections to a port, as the kernel shows them: those that a server has taken."""

from __future__ import annotations

import os
import socket

import pytest

from restore_agent.places.connections import accepted


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_what_was_accepted_and_is_open(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as server, socket.socket(family, socket.SOCK_STREAM) as client:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        assert accepted(os.getpid(), port) == 0
        client.connect((host, port))
        assert accepted(os.getpid(), port) == 0, "nobody has taken it"
        taken, _ = server.accept()
        with taken:
            assert accepted(os.getpid(), port) == 1
            client.close()
            assert accepted(os.getpid(), port) == 0, "its client has gone"


def test_a_process_that_has_ended_has_none() -> None:
    assert accepted(2**22 + 1, 80) == 0
