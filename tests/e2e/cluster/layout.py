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
DISK = STATE / "disk"  # what the node writes below /etc, /opt, /var/lib and /var/log
KUBECONFIG = STATE / "admin.kubeconfig"
CONTROL = STATE / "control"
PID = STATE / "pid"
ADDRESSES = STATE / "addresses.json"

NODE = "zerowake-node"
PAUSE_IMAGE = "zerowake.test/pause:1"


@dataclass(frozen=True)
class Addresses:
    """The node has a network of its own, joined to the machine's by a pair of virtual interfaces. `number` keeps clusters apart that
    several checkouts run on one machine."""

    number: int

    @property
    def interface(self) -> str:
        return f"zerowake{self.number}"

    @property
    def machine(self) -> str:
        """This machine, as the cluster sees it: where a test's own servers listen."""
        return f"10.{88 + self.number}.1.1"

    @property
    def node(self) -> str:
        return f"10.{88 + self.number}.1.2"

    @property
    def pods(self) -> str:
        return f"10.{88 + self.number}.0.0/24"

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


MOST_CLUSTERS = 8
OVERLAYFS_MAGIC = "794c7630"  # as `stat --file-system --format=%t` shows it
