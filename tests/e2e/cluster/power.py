"""A node's power: its processes begin, end at once as when the power is cut, and begin again on the disk as it was left."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.e2e.cluster.control import ControlError, current, known, running
from tests.e2e.cluster.layout import FIRST, Addresses, Member, members
from tests.e2e.cluster.node import cgroups

GONE_SECONDS = 30.0


def crash(name: str) -> None:
    """The control groups go, too, as with the kernel: a kubelet that finds containers' groups and no containers waits for seconds."""
    member = known(name)
    if member == FIRST:
        raise ControlError(f"{name} has the control plane: without it nobody could see the others. `make cluster-down` ends all of it.")
    end_node(member)
    for group in cgroups(current()):
        for _ in attempts(f"nothing runs in {group / name}"):
            if remove_groups(group / name):
                break


def boot(name: str) -> None:
    member = next((each for each in members() if each.name == name), None)
    if member is None or not running():
        known(name)  # says why
    elif running(member):
        raise ControlError(f"{name} runs already")
    else:
        node = start(member)
        prepare(current(), member, node)
        if failure := follow(member, node):
            end_node(member)
            raise ControlError(f"{name} did not start: {failure}")


def start(member: Member) -> subprocess.Popen[str]:
    """Its process 1, which waits for a network."""
    # Held by process 1 for as long as it lives: a pid alone may be somebody else's by now.
    lock = os.open(member.lock, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    namespaces = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
    with said_by(member).open("w") as log:
        node = subprocess.Popen(
            [*namespaces, sys.executable, "-m", "tests.e2e.cluster.node"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            pass_fds=(lock,),
            start_new_session=True,
        )
    os.close(lock)
    assert node.stdout
    pid = node.stdout.readline().strip()
    if not pid:
        raise SystemExit(f"{member.name} did not start: {said_by(member).read_text().strip()}")
    member.pid.write_text(pid)
    return node


def said_by(member: Member) -> Path:
    """What its process 1 has said, where it could not begin."""
    return member.folder / "node.log"


def prepare(addresses: Addresses, member: Member, node: subprocess.Popen[str]) -> None:
    """Its network is made, and it is told to go on."""
    if member != FIRST:
        join_first(addresses, member)
    assert node.stdin
    node.stdin.write(json.dumps({"cluster": addresses.number, "node": member.number}) + "\n")
    node.stdin.flush()


def follow(member: Member, node: subprocess.Popen[str]) -> str:
    """Shows what it does until it is ready; returns what went wrong instead."""
    assert node.stdout
    for line in node.stdout:
        if line == "ready\n":
            return ""
        if line.startswith("failed "):
            return str(json.loads(line.removeprefix("failed ")))
        print(line, end="", flush=True)
    return said_by(member).read_text().strip()


def join_first(addresses: Addresses, member: Member) -> None:
    """A pair of interfaces: `eth0` in the node's network, and one of its name in the first node's, with a route to its pods.

    That node forwards, and so it has to be told nothing else: its own default leads to the machine.
    """
    inside = ["nsenter", f"--target={FIRST.pid.read_text()}", "--net", "ip"]
    # Of one that has crashed: its network outlives it for as long as one of its connections waits for an answer.
    subprocess.run([*inside, "link", "delete", member.name], capture_output=True, check=False)
    for command in (
        ["link", "add", member.name, "type", "veth", "peer", "name", "eth0", "netns", member.pid.read_text()],
        ["address", "add", f"{addresses.router(member)}/30", "dev", member.name],
        ["link", "set", member.name, "up"],
        ["route", "add", addresses.pods_on(member), "via", addresses.of(member)],
    ):
        subprocess.run([*inside, *command], check=True)


def end_node(member: Member) -> None:
    if not running(member):
        return
    with suppress(ProcessLookupError):
        os.kill(int(member.pid.read_text()), signal.SIGKILL)
    for _ in attempts(f"the process of {member.name} is gone"):
        if not running(member):
            return


def attempts(what: str) -> Iterator[None]:
    """Yields until the caller is content; fails after GONE_SECONDS."""
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        yield
        time.sleep(0.05)
    raise SystemExit(f"not so after {GONE_SECONDS:g} s: {what}. Look at what is left and run `make cluster-down` again.")


def remove_groups(group: Path) -> bool:
    """From the innermost outwards. A group whose last process is still ending can't be removed yet."""
    try:
        for path, _, _ in os.walk(group, topdown=False):
            Path(path).rmdir()
    except OSError:
        return False
    return True
