"""Every program of the cluster: its command line, its configuration, and how to see that it is up.

The names, ports and paths are those that the programs have on ordinary nodes (the node has /run, /etc and /var/lib of its own), so that
what is written for a cluster finds them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.cluster import gpu_runtime
from tests.e2e.cluster.authority import Authority
from tests.e2e.cluster.layout import BIN, FIRST, KUBECONFIG, PAUSE_IMAGE, SECRETS, Addresses, Member

CONTAINERD_SOCKET = Path("/run/containerd/containerd.sock")
GPU_RUNTIME = Path("/etc/containerd/nvidia-runtime")
MASTERS = ("system:masters",)
KEDA_USER = "system:serviceaccount:keda:keda-operator"  # what KEDA's own role bindings name


@dataclass(frozen=True)
class Component:
    name: str
    command: list[str]
    probe: str  # an URL that answers below 500 when it is up, or the path of its socket
    environment: Mapping[str, str] = field(default_factory=dict)


def components(addresses: Addresses, member: Member) -> dict[str, Component]:
    """Of one node. Writes what they read and returns them in the order in which they start. The cluster has its secrets already."""
    _write_node_configuration(addresses, member)
    every = [_containerd(), _kubelet(member), _kube_proxy(addresses, member)]
    if member == FIRST:
        every = [
            _etcd(),
            _api_server(addresses),
            _controller_manager(addresses),
            _scheduler(),
            *every,
            _coredns(),
            _keda_operator(),
            _keda_adapter(),
        ]
    return {component.name: component for component in every}


def write_secrets(addresses: Addresses, members: Iterable[Member]) -> None:
    """Certificates and kubeconfigs, in SECRETS under the names that the command lines below use: once for a cluster, before any node."""
    SECRETS.mkdir(mode=0o700, parents=True)
    cluster, front = Authority(SECRETS, "ca"), Authority(SECRETS, "front-proxy-ca")
    api_names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"]
    cluster.issue("apiserver", "kube-apiserver", hosts=[*api_names, "127.0.0.1", addresses.node, addresses.api_service])
    cluster.issue("apiserver-kubelet", "kube-apiserver-kubelet", MASTERS)
    cluster.issue("service-accounts", "service-accounts")
    front.issue("front-proxy", "front-proxy")
    keda = Authority(SECRETS, "keda-ca")
    (SECRETS / "keda").mkdir()
    (SECRETS / "keda/ca.crt").write_bytes(keda.certificate.read_bytes())
    keda.issue("keda/tls", "keda", hosts=["localhost", "keda-metrics-apiserver.keda.svc", "127.0.0.1"])
    cluster.kubeconfig(KUBECONFIG, addresses.api, "kubernetes-admin", MASTERS)
    for name in ("kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns"):
        cluster.kubeconfig(_kubeconfig(name), addresses.api, f"system:{name}")
    cluster.kubeconfig(_kubeconfig("keda"), addresses.api, KEDA_USER, ["system:serviceaccounts", "system:serviceaccounts:keda"])
    for member in members:
        user = f"system:node:{member.name}"
        cluster.issue(member.name, user, ["system:nodes"], hosts=[member.name, addresses.of(member)])
        cluster.kubeconfig(_kubeconfig(member.name), addresses.api, user, ["system:nodes"])


def _kubeconfig(user: str) -> Path:
    return SECRETS / f"{user}.kubeconfig"


def _write_node_configuration(addresses: Addresses, member: Member) -> None:
    pods = {"type": "host-local", "subnet": addresses.pods_on(member), "routes": [{"dst": "0.0.0.0/0"}]}
    cni = {
        "cniVersion": "1.0.0",
        "name": "zerowake",
        # Routed, not bridged: what kube-proxy translates on the way to a pod then passes it on the way back, whatever the kernel's modules.
        "plugins": [{"type": "ptp", "ipam": pods}],
    }
    files = {
        "/etc/cni/net.d/10-zerowake.conflist": json.dumps(cni),
        "/etc/containerd/config.toml": CONTAINERD.format(pause=PAUSE_IMAGE, gpu_runtime=GPU_RUNTIME),
        str(GPU_RUNTIME): f'#!/bin/sh\nexec "{sys.executable}" "{gpu_runtime.__file__}" "$@"\n',
        "/etc/hosts": f"127.0.0.1 localhost\n{addresses.of(member)} {member.name}\n",
        "/etc/resolv.conf": f"nameserver {addresses.node}\nsearch svc.cluster.local cluster.local\noptions ndots:5\n",
        "/etc/coredns/Corefile": COREFILE.format(address=addresses.node, kubeconfig=_kubeconfig("coredns")),
        "/etc/kubernetes/kubelet.json": json.dumps(_kubelet_configuration(addresses, member)),
    }
    for path, content in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).unlink(missing_ok=True)  # /etc/resolv.conf is often a link into /run
        Path(path).write_text(content)
    GPU_RUNTIME.chmod(0o755)
    if not Path("/etc/machine-id").exists():
        Path("/etc/machine-id").write_text("0" * 32 + "\n")


# restrict_oom_score_adj: without CAP_SYS_RESOURCE, as in many a CI, no sandbox would start.
CONTAINERD = """\
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.nvidia]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.nvidia.options]
BinaryName = "{gpu_runtime}"
SystemdCgroup = false
"""

COREFILE = """\
.:53 {{
    bind {address}
    errors
    ready 127.0.0.1:8181
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig}
        ttl 1
    }}
}}
"""


def _kubelet_configuration(addresses: Addresses, member: Member) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": addresses.of(member),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(SECRETS / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(SECRETS / f"{member.name}.crt"),
        "tlsPrivateKeyFile": str(SECRETS / f"{member.name}.key"),
        "clusterDNS": [addresses.node],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": addresses.cgroup_of(member),
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        # The disk is the machine's, however full; the images are the tests', and come from nowhere else.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "nodeLeaseDurationSeconds": 20,  # it says every five seconds that it lives
        "shutdownGracePeriod": "0s",
    }


def _etcd() -> Component:
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    options = {"data-dir": "/var/lib/etcd", "listen-client-urls": client, "advertise-client-urls": client, "listen-peer-urls": peer}
    members = {"initial-advertise-peer-urls": peer, "initial-cluster": f"default={peer}"}
    # A test cluster has nothing to lose in a power failure.
    return Component("etcd", _command("etcd", options | members, "--unsafe-no-fsync"), f"{client}/health")


def _containerd() -> Component:
    return Component("containerd", _command("containerd", {"config": "/etc/containerd/config.toml"}), str(CONTAINERD_SOCKET))


def _api_server(addresses: Addresses) -> Component:
    options = {
        "advertise-address": addresses.node,
        "allow-privileged": "true",
        "authorization-mode": "Node,RBAC",
        "client-ca-file": SECRETS / "ca.crt",
        "enable-admission-plugins": "NodeRestriction",
        "etcd-servers": "http://127.0.0.1:2379",
        "kubelet-certificate-authority": SECRETS / "ca.crt",
        "kubelet-client-certificate": SECRETS / "apiserver-kubelet.crt",
        "kubelet-client-key": SECRETS / "apiserver-kubelet.key",
        "kubelet-preferred-address-types": "InternalIP",
        "proxy-client-cert-file": SECRETS / "front-proxy.crt",
        "proxy-client-key-file": SECRETS / "front-proxy.key",
        "requestheader-allowed-names": "front-proxy",
        "requestheader-client-ca-file": SECRETS / "front-proxy-ca.crt",
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-username-headers": "X-Remote-User",
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "service-account-key-file": SECRETS / "service-accounts.crt",
        "service-account-signing-key-file": SECRETS / "service-accounts.key",
        "service-cluster-ip-range": addresses.services,
        "tls-cert-file": SECRETS / "apiserver.crt",
        "tls-private-key-file": SECRETS / "apiserver.key",
    }
    return Component("kube-apiserver", _command("kube-apiserver", options), f"{addresses.api}/readyz")


def _controller_manager(addresses: Addresses) -> Component:
    options = {
        "bind-address": "127.0.0.1",
        "cluster-signing-cert-file": SECRETS / "ca.crt",
        "cluster-signing-key-file": SECRETS / "ca.key",
        "kubeconfig": _kubeconfig("kube-controller-manager"),
        "leader-elect": "false",
        "node-monitor-grace-period": "20s",  # tests wait until a node that is gone counts as gone; the default is 50 s
        "root-ca-file": SECRETS / "ca.crt",
        "service-account-private-key-file": SECRETS / "service-accounts.key",
        "service-cluster-ip-range": addresses.services,
        "use-service-account-credentials": "true",
    }
    return Component("kube-controller-manager", _command("kube-controller-manager", options), "https://127.0.0.1:10257/healthz")


def _scheduler() -> Component:
    options = {"bind-address": "127.0.0.1", "kubeconfig": _kubeconfig("kube-scheduler"), "leader-elect": "false"}
    return Component("kube-scheduler", _command("kube-scheduler", options), "https://127.0.0.1:10259/healthz")


def _kubelet(member: Member) -> Component:
    options = {"config": "/etc/kubernetes/kubelet.json", "hostname-override": member.name, "kubeconfig": _kubeconfig(member.name)}
    return Component("kubelet", _command("kubelet", options), "http://127.0.0.1:10248/healthz")


def _kube_proxy(addresses: Addresses, member: Member) -> Component:
    options = {
        "cluster-cidr": addresses.pods,
        "conntrack-max-per-core": "0",  # these limits belong to the whole machine
        "conntrack-tcp-timeout-close-wait": "0s",
        "conntrack-tcp-timeout-established": "0s",
        "hostname-override": member.name,
        "kubeconfig": _kubeconfig("kube-proxy"),
        "proxy-mode": "nftables",
    }
    return Component("kube-proxy", _command("kube-proxy", options), "http://127.0.0.1:10249/healthz")


def _coredns() -> Component:
    return Component("coredns", [str(BIN / "coredns"), "-conf", "/etc/coredns/Corefile"], "http://127.0.0.1:8181/ready")


def _keda_environment() -> dict[str, str]:
    names = {"POD_NAMESPACE": "keda", "KEDA_CLUSTER_OBJECT_NAMESPACE": "keda", "WATCH_NAMESPACE": ""}
    return {"KUBECONFIG": str(_kubeconfig("keda")), **names}


def _keda_operator() -> Component:
    options = {
        "cert-dir": SECRETS / "keda",
        "enable-cert-rotation": "false",
        "health-probe-bind-address": "127.0.0.1:9668",
        "metrics-bind-address": "127.0.0.1:9667",
        "metrics-service-bind-address": "127.0.0.1:9666",
        "zap-log-level": "info",
    }
    command = _command("keda-operator", options)
    return Component("keda-operator", command, "http://127.0.0.1:9668/readyz", _keda_environment())


def _keda_adapter() -> Component:
    options = {
        "authentication-kubeconfig": _kubeconfig("keda"),
        "authorization-kubeconfig": _kubeconfig("keda"),
        "cert-dir": SECRETS / "keda",
        "client-ca-file": SECRETS / "keda/ca.crt",
        "lister-kubeconfig": _kubeconfig("keda"),
        "metrics-service-address": "localhost:9666",
        "port": "9669",
        "secure-port": "7443",
        "tls-cert-file": SECRETS / "keda/tls.crt",
        "tls-private-key-file": SECRETS / "keda/tls.key",
    }
    command = _command("keda-adapter", options)
    return Component("keda-adapter", command, "https://127.0.0.1:7443/readyz", _keda_environment())


def _command(program: str, options: Mapping[str, object], *flags: str) -> list[str]:
    return [str(BIN / program), *(f"--{name}={value}" for name, value in options.items()), *flags]
