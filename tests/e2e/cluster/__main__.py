"""The test cluster from the command line: `python -m tests.e2e.cluster [--node=NODE] VERB`; NODE is the first one unless it is named.

up [NODES]                  starts it, with two nodes unless told otherwise (its programs come from build.sh)
down                        ends it and leaves nothing behind
exec COMMAND…               runs a command on the node, as root, in its namespaces
images                      builds zerowake's images and the tests' engine, where they have changed, and gives them to all nodes
import ARCHIVE…             gives all nodes other images, from archives of the OCI or Docker kind
start | stop | restart | kill NAME
                            one of the node's programs, e.g. kubelet, kube-apiserver, keda-operator
crash                       the node loses its power: every process of it ends at once, and its disk stays; not the first one
boot                        starts a node that has crashed
environment                 the lines that make a shell use it: eval "$(… environment)"
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.cluster import images
from tests.e2e.cluster.components import write_secrets
from tests.e2e.cluster.control import ControlError, current, enter, import_archives, running, tell
from tests.e2e.cluster.layout import (
    ADDRESSES,
    BIN,
    FIRST,
    KUBECONFIG,
    LOGS,
    MOST_CLUSTERS,
    MOST_NODES,
    NODE,
    STATE,
    Addresses,
    Member,
    members,
)
from tests.e2e.cluster.node import CGROUPS, cgroups, give_controllers
from tests.e2e.cluster.power import attempts, boot, crash, end_node, follow, prepare, remove_groups, start

USUAL_NODES = 2


def main() -> None:
    node, words = NODE, sys.argv[1:]
    if words and words[0].startswith("--node="):
        node, words = words[0].removeprefix("--node="), words[1:]
    match words:
        case ["up"]:
            up(USUAL_NODES)
        case ["up", count] if count.isdigit() and 0 < int(count) <= MOST_NODES:
            up(int(count))
        case ["down"]:
            down()
        case ["exec", *command] if command:
            inside = enter(node)
            os.execvp(inside[0], [*inside, *command])
        case ["images"]:
            import_archives(images.build())
        case ["import", *archives] if archives:
            import_archives([Path(archive) for archive in archives])
        case [("start" | "stop" | "restart" | "kill") as verb, name]:
            tell(verb, name, node)
        case ["crash"]:
            crash(node)
        case ["boot"]:
            boot(node)
        case ["environment"]:
            print(f"export KUBECONFIG={KUBECONFIG} PATH={BIN}:$PATH")
        case _:
            raise SystemExit(__doc__)


def up(count: int) -> None:
    if os.geteuid():
        raise SystemExit("The cluster needs root: it makes namespaces, mounts and control groups.")
    if running():
        print(f"  the cluster is running already, with {len(members())} nodes: export KUBECONFIG={KUBECONFIG}")
        return
    began = time.monotonic()
    down()
    give_controllers(CGROUPS)
    every = [Member(number) for number in range(1, count + 1)]
    for member in every:
        member.folder.mkdir(parents=True)
    nodes = [start(member) for member in every]
    addresses = join_machine()
    ADDRESSES.write_text(json.dumps({"number": addresses.number}))
    for group in cgroups(addresses):
        group.mkdir(exist_ok=True)
        give_controllers(group)
    write_secrets(addresses, every)
    for member, node in zip(every, nodes, strict=True):
        prepare(addresses, member, node)
    for member, node in zip(every, nodes, strict=True):
        if failure := follow(member, node):
            fail(failure)
    print(f"  the cluster is up after {time.monotonic() - began:.1f} s, with {count} nodes: export KUBECONFIG={KUBECONFIG}")


def fail(reason: str) -> None:
    """Only the state is kept, for its logs."""
    end_nodes()
    raise SystemExit(f"\nThe cluster did not start: {reason}\n  Every program's log is in {LOGS}; `make cluster-down` removes them.")


def join_machine() -> Addresses:
    """A pair of interfaces: `eth0` in the first node's network, the other here, with routes to nodes, pods and services."""
    for addresses in map(Addresses, range(MOST_CLUSTERS)):
        pair = ["ip", "link", "add", addresses.interface, "type", "veth", "peer", "name", "eth0", "netns", FIRST.pid.read_text()]
        if subprocess.run(pair, capture_output=True, check=False).returncode == 0:
            break
    else:
        raise SystemExit(
            f"none of the interfaces zerowake0 to zerowake{MOST_CLUSTERS - 1} can be made: are so many clusters running? See `ip link`."
        )
    for command in (
        ["address", "add", f"{addresses.machine}/30", "dev", addresses.interface],
        ["link", "set", addresses.interface, "up"],
        *(["route", "add", range_, "via", addresses.node] for range_ in (addresses.nodes, addresses.pods, addresses.services)),
    ):
        subprocess.run(["ip", *command], check=True)
    return addresses


def down() -> None:
    """Ends the nodes, then removes what the kernel keeps beyond them. Good also for what a crash left, its state folder lost or not."""
    end_nodes()
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


def end_nodes() -> None:
    for member in members():
        end_node(member)


if __name__ == "__main__":
    try:
        main()
    except ControlError as error:
        raise SystemExit(str(error)) from None
