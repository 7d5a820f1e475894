#!/usr/bin/env bash
# Brings what the test cluster is made of into the cache folder: programs built from pinned Go modules (modules/*/go.mod, go.sum), KEDA's
# own manifests, and an image to begin with. What is there already and still fits its pins is kept, so an interrupted run goes on where it
# was. Everything else (runc, CNI plugins, nft) is the distribution's.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. deploy/steps.sh

modules=tests/e2e/cluster/modules
cache=${ZEROWAKE_CLUSTER_CACHE:-$HOME/.cache/zerowake-cluster}
bin=$cache/bin
mkdir -p "$bin" "$cache/images"

[ "$(id -u)" = 0 ] || fail "a cluster needs root: it makes namespaces, mounts and control groups." "Run: sudo make cluster"
exec 9>"$cache/.building"
flock -n 9 || { echo "  another run is building into $cache: waiting for it"; flock 9; }

need runc containernetworking-plugins nftables iproute2 util-linux mount

. tests/e2e/cluster/go.sh

version=$(pinned kubernetes k8s.io/kubernetes)
stamp="-X k8s.io/component-base/version.gitVersion=$version -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=$(cut -d. -f2 <<<"$version")"
programs=(etcd=go.etcd.io/etcd/server/v3)
for name in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
    programs+=("$name=k8s.io/kubernetes/cmd/$name")
done
build kubernetes "$stamp" "" "${programs[@]}"
programs=()
for name in containerd containerd-shim-runc-v2 ctr; do
    programs+=("$name=github.com/containerd/containerd/v2/cmd/$name")
done
# Without the snapshotters that need libraries or devices which a test machine lacks.
build containerd "-X github.com/containerd/containerd/v2/version.Version=$(pinned containerd github.com/containerd/containerd/v2)" \
    "no_btrfs no_zfs no_devmapper" "${programs[@]}"
build coredns "" "" coredns=.
build helm "" "" helm=helm.sh/helm/v4/cmd/helm
build keda "" "" keda-operator=github.com/kedacore/keda/v2/cmd/operator keda-adapter=github.com/kedacore/keda/v2/cmd/adapter

# Its operator and its adapter are processes of the node here: only what they need in the API is applied.
keda_manifests() {
    local module
    module=$(cd "$modules/keda" && $(go_path) list -m -f '{{.Dir}}' github.com/kedacore/keda/v2)
    rm -rf "$cache/.keda.new"
    mkdir "$cache/.keda.new"
    cp "$module"/config/crd/bases/*.yaml "$module/config/service_account/service_account.yaml" "$cache/.keda.new"
    for path in rbac/role rbac/role_binding metrics-server/role metrics-server/role_binding; do
        cp "$module/config/$path.yaml" "$cache/.keda.new/${path//\//-}.yaml"
    done
    chmod -R u+w "$cache/.keda.new"
    pinned keda github.com/kedacore/keda/v2 >"$cache/.keda.new/.version"
    rm -rf "$cache/keda"
    mv "$cache/.keda.new" "$cache/keda"
}
[ "$(cat "$cache/keda/.version" 2>/dev/null)" = "$(pinned keda github.com/kedacore/keda/v2)" ] || step "copying KEDA's manifests" unknown keda_manifests

# A root folder of busybox alone; it is the pods' sandbox, and what tests start where no engine is needed.
pause_image() {
    local root=$cache/.busybox
    rm -rf "$root"
    mkdir -p "$root/root/bin" "$root/root/tmp"
    (cd "$root" && apt-get download -o APT::Sandbox::User=root busybox-static && dpkg-deb -x busybox-static_*.deb package)
    cp "$(find "$root/package" -path '*/bin/busybox')" "$root/root/bin/busybox"
    for name in $("$root/root/bin/busybox" --list); do
        [ "$name" = busybox ] || ln -s busybox "$root/root/bin/$name"
    done
    .venv/bin/python -m tests.e2e.cluster.archive "$root/root" zerowake.test/pause:1 "$cache/images/pause.tar" /bin/sleep infinity
    rm -rf "$root"
}
[ -e "$cache/images/pause.tar" ] || { refresh; step "making the pause image" unknown pause_image; }
