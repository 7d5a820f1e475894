"""A network namespace of a test's own."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def network_namespace() -> Iterator[str]:
    """Its name, as `ip netns` has it, with loopback up; its path is /run/netns/NAME. Skips the test where none can be made."""
    if os.geteuid() != 0:
        pytest.skip("needs root (CAP_SYS_ADMIN) to make a network namespace")
    name = f"zerowake-test-{secrets.token_hex(4)}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs `ip` (iproute2) to make a network namespace")
    if made.returncode != 0:
        pytest.skip(f"needs `ip netns add` to work: {made.stderr.strip()}")
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
