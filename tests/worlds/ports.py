"""Ports for programs of tests, which run beside each other."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Of this machine's loopback, free as it returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
