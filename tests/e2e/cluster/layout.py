"""Where the cluster keeps its things, and its addresses.

Two folders: the cache, which outlives clusters (programs, archives of images), and the state of the one that runs, gone with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("ZEROWAKE_CLUSTER_CACHE") or Path.home() / ".cache/zerowake-cluster")
BIN = CACHE / "bin"
ARCHIVES = CACHE / "images"
KEDA_MANIFESTS = CACHE / "keda"
STATE = CACHE / "state"

SECRETS = STATE / "secrets"  # certificates and keys
LOGS = STATE / "log"
KUBECONFIG = STATE / "admin.kubeconfig"
ADDRESSES = STATE / "addresses.json"

NODE, SECOND_NODE = "zerowake-node", "zerowake-node-2"
PAUSE_IMAGE = "zerowake.test/pause:1"


@dataclass(frozen=True)
class Member:
    """One node of the cluster, by its number from 1 on: its name, and where it keeps its things. The first has the control plane."""

    number: int

    @classmethod
    def named(cls, name: str) -> Member:
        """Raises: KeyError where the cluster has no such node."""
        return {each.name: each for each in members()}[name]

    @property
    def name(self) -> str:
        return NODE if self.number == 1 else f"{NODE}-{self.number}"

    @property
    def folder(self) -> Path:
        return STATE / "nodes" / self.name

    @property
    def disk(self) -> Path:
        """What the node writes below /etc, /opt, /var/lib and /var/log."""
        return self.folder / "disk"

    @property
    def pid(self) -> Path:
        """Names its process 1, as the machine sees it."""
        return self.folder / "pid"

    @property
    def lock(self) -> Path:
        """Held by its process 1 for as long as that lives."""
        return self.folder / "lock"

    @property
    def control(self) -> Path:
        """The socket that stops and starts its programs."""
        return self.folder / "control"

    def log(self, program: str) -> Path:
        return LOGS / (f"{program}.log" if self.number == 1 else f"{program}-{self.number}.log")


FIRST = Member(1)


def members() -> list[Member]:
    """The nodes that the cluster has, dead ones too."""
    found: list[Member] = []
    while (member := Member(len(found) + 1)).folder.exists():
        found.append(member)
    return found


@dataclass(frozen=True)
class Addresses:
    """Each node has a network of its own. The first one's is joined to the machine's by a pair of virtual interfaces, each other one's to
    the first one's, which routes between them: the machine itself forwards nothing and needs no bridge, and one interface is all it has.
    `number` keeps clusters apart that several checkouts run on one machine."""

    number: int

    @property
    def interface(self) -> str:
        return f"zerowake{self.number}"

    @property
    def machine(self) -> str:
        """This machine, as the cluster sees it: where a test's own servers listen."""
        return self.router(FIRST)

    @property
    def node(self) -> str:
        """The first one."""
        return self.of(FIRST)

    @property
    def nodes(self) -> str:
        return f"10.{88 + self.number}.1.0/24"

    @property
    def pods(self) -> str:
        return f"10.{88 + self.number}.128.0/17"

    def of(self, member: Member) -> str:
        return f"10.{88 + self.number}.1.{4 * member.number - 2}"

    def router(self, member: Member) -> str:
        """The other end of the node's link, by which it reaches all else: the machine's, or the first node's."""
        return f"10.{88 + self.number}.1.{4 * member.number - 3}"

    def pods_on(self, member: Member) -> str:
        return f"10.{88 + self.number}.{127 + member.number}.0/24"

    @property
    def services(self) -> str:
        return f"10.{96 + self.number}.0.0/16"

    @property
    def api_service(self) -> str:
        return f"10.{96 + self.number}.0.1"

    @property
    def api(self) -> str:
        return f"https://{self.node}:6443"

    @property
    def cgroup(self) -> str:
        return f"/zerowake-cluster-{self.number}"

    def cgroup_of(self, member: Member) -> str:
        return f"{self.cgroup}/{member.name}"


MOST_CLUSTERS = 8
MOST_NODES = 9
OVERLAYFS_MAGIC = "794c7630"  # as `stat --file-system --format=%t` shows it
