"""Ports for programs of tests, which run beside each other."""

from __future__ import annotations

import random
import socket

# Below those that the kernel gives to whoever asks for any: none of these is another's by the time the program has begun to listen.
_FIRST, _LAST = 10_000, 29_999
_CHANCE = random.SystemRandom()  # no test's seed has two processes draw alike
_given: set[int] = set()


def free_port() -> int:
    """Of this machine's loopback, free as it returns; this process was not given it before."""
    while True:
        port = _CHANCE.randint(_FIRST, _LAST)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
