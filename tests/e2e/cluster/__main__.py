"""The test cluster from the command line: `python -m tests.e2e.cluster VERB`.

up                          starts it (its programs come from build.sh)
down                        ends it and leaves nothing behind
exec COMMAND…               runs a command on the node, as root, in its namespaces
images                      builds zerowake's images and the tests' engine, where they have changed, and gives them to the node
import ARCHIVE…             gives the node other images, from archives of the OCI or Docker kind
start | stop | restart NAME one of its programs, e.g. kubelet, kube-apiserver, keda-operator
environment                 the lines that make a shell use it: eval "$(… environment)"
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.e2e.cluster import images
from tests.e2e.cluster.control import LOCK, ControlError, current, enter, import_archives, running, tell
from tests.e2e.cluster.layout import ADDRESSES, BIN, KUBECONFIG, LOGS, MOST_CLUSTERS, PID, STATE, Addresses
from tests.e2e.cluster.node import CGROUPS, cgroups, give_controllers

GONE_SECONDS = 30.0


def main() -> None:
    match sys.argv[1:]:
        case ["up"]:
            up()
        case ["down"]:
            down()
        case ["exec", *command] if command:
            inside = enter()
            os.execvp(inside[0], [*inside, *command])
        case ["images"]:
            import_archives(images.build())
        case ["import", *archives] if archives:
            import_archives([Path(archive) for archive in archives])
        case [("start" | "stop" | "restart") as verb, name]:
            tell(verb, name)
        case ["environment"]:
            print(f"export KUBECONFIG={KUBECONFIG} PATH={BIN}:$PATH")
        case _:
            raise SystemExit(__doc__)


def up() -> None:
    if os.geteuid():
        raise SystemExit("The cluster needs root: it makes namespaces, mounts and control groups.")
    if running():
        print(f"  the cluster is running already: export KUBECONFIG={KUBECONFIG}")
        return
    began = time.monotonic()
    down()
    give_controllers(CGROUPS)
    STATE.mkdir(parents=True)
    # Held by process 1 for as long as it lives: a pid alone may be somebody else's by now.
    lock = os.open(LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    namespaces = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
    log = (STATE / "node.log").open("w")
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
    assert node.stdin and node.stdout
    pid = node.stdout.readline().strip()
    if not pid:
        raise SystemExit(f"the node did not start: {(STATE / 'node.log').read_text().strip()}")
    PID.write_text(pid)
    addresses = join_networks(int(pid))
    ADDRESSES.write_text(json.dumps({"number": addresses.number}))
    node.stdin.write(f"{addresses.number}\n")
    node.stdin.flush()
    for line in node.stdout:
        if line == "ready\n":
            print(f"  the cluster is up after {time.monotonic() - began:.1f} s: export KUBECONFIG={KUBECONFIG}")
            return
        if line.startswith("failed "):
            fail(json.loads(line.removeprefix("failed ")))
        print(line, end="", flush=True)
    fail((STATE / "node.log").read_text().strip())


def fail(reason: str) -> None:
    """Only the state is kept, for its logs."""
    end_node()
    raise SystemExit(f"\nThe cluster did not start: {reason}\n  Every program's log is in {LOGS}; `make cluster-down` removes them.")


def join_networks(pid: int) -> Addresses:
    """A pair of interfaces: `eth0` in the node's network, the other here, with routes to pods and services."""
    for addresses in map(Addresses, range(MOST_CLUSTERS)):
        pair = ["ip", "link", "add", addresses.interface, "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        if subprocess.run(pair, capture_output=True, check=False).returncode == 0:
            break
    else:
        raise SystemExit(
            f"none of the interfaces zerowake0 to zerowake{MOST_CLUSTERS - 1} can be made: are so many clusters running? See `ip link`."
        )
    for command in (
        ["address", "add", f"{addresses.machine}/30", "dev", addresses.interface],
        ["link", "set", addresses.interface, "up"],
        ["route", "add", addresses.pods, "via", addresses.node],
        ["route", "add", addresses.services, "via", addresses.node],
    ):
        subprocess.run(["ip", *command], check=True)
    return addresses


def down() -> None:
    """Ends the node, then removes what the kernel keeps beyond it. Good also for what a crash left, its state folder lost or not."""
    end_node()
    if ADDRESSES.exists():
        own = current()
        for _ in attempts(f"the interface {own.interface} is gone"):
            if not joined(own):
                break
            # A dead node's network outlives it for as long as one of its connections waits for an answer: minutes.
            subprocess.run(["ip", "link", "delete", own.interface], capture_output=True, check=False)
        for group in cgroups(own):
            for _ in attempts(f"nothing runs in {group}"):
                if remove_groups(group):
                    break
    for other in map(Addresses, range(MOST_CLUSTERS)):
        if not joined(other):
            for group in cgroups(other):
                remove_groups(group)
    if STATE.exists():
        shutil.rmtree(STATE)


def joined(addresses: Addresses) -> bool:
    return Path("/sys/class/net", addresses.interface).exists()


def end_node() -> None:
    if not running():
        return
    with suppress(ProcessLookupError):
        os.kill(int(PID.read_text()), signal.SIGKILL)
    for _ in attempts("the node's process is gone"):
        if not running():
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


if __name__ == "__main__":
    try:
        main()
    except ControlError as error:
        raise SystemExit(str(error)) from None
