"""The running cluster from outside: is it there, commands on its node, its programs stopped and started, images for it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
from pathlib import Path

from tests.e2e.cluster.layout import ADDRESSES, BIN, CONTROL, KUBECONFIG, PID, STATE, Addresses

LOCK = STATE / "lock"
NOT_RUNNING = "The cluster is not running: `make cluster` starts it."


class ControlError(Exception):
    """The message says what to do."""


def running() -> bool:
    try:
        lock = os.open(LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return PID.exists()
    finally:
        os.close(lock)
    return False


def current() -> Addresses:
    return Addresses(json.loads(ADDRESSES.read_text())["number"])


def enter(*, own_processes: bool = True) -> list[str]:
    """The beginning of a command that runs on the node. With `own_processes` it is a child, in the node's numbering; without, the command
    is the very process that is started, so that whoever ends it has ended it."""
    if not running():
        raise ControlError(NOT_RUNNING)
    namespaces = ["--mount", "--net", "--uts", "--ipc", *(["--pid"] if own_processes else [])]
    inside = ["nsenter", f"--target={PID.read_text()}", *namespaces, f"--wdns={Path.cwd()}"]
    return [*inside, "env", f"PATH={BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", f"KUBECONFIG={KUBECONFIG}"]


def import_archives(archives: list[Path]) -> None:
    """Gives the node images; one that it was given already is left out."""
    for archive in archives:
        given, now = STATE / f"imported-{archive.stem}", f"{archive.resolve()} {archive.stat().st_mtime_ns}"
        if given.exists() and given.read_text() == now:
            continue
        command = [*enter(), "ctr", "--namespace=k8s.io", "images", "import", "--all-platforms", str(archive.resolve())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ControlError(f"the node could not read {archive}: {done.stderr.strip()}")
        given.write_text(now)


def tell(verb: str, name: str) -> None:
    """`start`, `stop` or `restart` one of the cluster's programs; done when it is up, or has ended."""
    if not running():
        raise ControlError(NOT_RUNNING)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(CONTROL))
        client.sendall(f"{verb} {name}\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    if answer != "ok":
        raise ControlError(answer)
