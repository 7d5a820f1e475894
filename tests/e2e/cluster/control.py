"""The running cluster from outside: is it there, commands on its nodes, their programs stopped and started, images for them."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.e2e.cluster.layout import ADDRESSES, BIN, FIRST, KUBECONFIG, NODE, Addresses, Member, members

NOT_RUNNING = "The cluster is not running: `make cluster` starts it."


class ControlError(Exception):
    """The message says what to do."""


def running(member: Member = FIRST) -> bool:
    try:
        lock = os.open(member.lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return member.pid.exists()
    finally:
        os.close(lock)
    return False


def current() -> Addresses:
    return Addresses(json.loads(ADDRESSES.read_text())["number"])


def enter(node: str = NODE, *, own_processes: bool = True) -> list[str]:
    """The beginning of a command that runs on a node. With `own_processes` it is a child, in the node's numbering; without, the command
    is the very process that is started, so that whoever ends it has ended it."""
    member = known(node)
    namespaces = ["--mount", "--net", "--uts", "--ipc", *(["--pid"] if own_processes else [])]
    inside = ["nsenter", f"--target={member.pid.read_text()}", *namespaces, f"--wdns={Path.cwd()}"]
    return [*inside, "env", f"PATH={BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", f"KUBECONFIG={KUBECONFIG}"]


def known(node: str) -> Member:
    """The node of that name, which runs. Raises: ControlError."""
    if not running():
        raise ControlError(NOT_RUNNING)
    try:
        member = Member.named(node)
    except KeyError:
        raise ControlError(f"there is no node {node!r}: there are {', '.join(each.name for each in members())}") from None
    if not running(member):
        raise ControlError(f"{node} does not run: `python -m tests.e2e.cluster boot {node}` starts it.")
    return member


def import_archives(archives: list[Path]) -> None:
    """Gives every node images, all nodes at a time; one that it was given already is left out."""
    if not running():
        raise ControlError(NOT_RUNNING)
    every = [member for member in members() if running(member)]
    with ThreadPoolExecutor(len(every)) as pool:
        for _ in pool.map(lambda member: _import(member, archives), every):
            pass


def _import(member: Member, archives: list[Path]) -> None:
    for archive in archives:
        given, now = member.folder / f"imported-{archive.stem}", f"{archive.resolve()} {archive.stat().st_mtime_ns}"
        if given.exists() and given.read_text() == now:
            continue
        # On the others the container runtime unpacks what it starts, when it does: each node has few of the images in use.
        unpacking = [] if member == FIRST else ["--no-unpack"]
        images = [*enter(member.name), "ctr", "--namespace=k8s.io", "images"]
        command = [*images, "import", "--all-platforms", *unpacking, str(archive.resolve())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ControlError(f"{member.name} could not read {archive}: {done.stderr.strip()}")
        given.write_text(now)


def tell(verb: str, name: str, node: str = NODE) -> None:
    """`start`, `stop` or `restart` one of a node's programs, or `kill` it, as a crash does; done when it is up, or has ended."""
    member = known(node)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(member.control))
        client.sendall(f"{verb} {name}\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    if answer != "ok":
        raise ControlError(answer)
