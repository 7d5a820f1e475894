#!/usr/bin/env bash
# Brings what the test cluster is made of into the cache folder: programs built from pinned Go modules (modules/*/go.mod, go.sum), KEDA's
# own manifests, and an image to begin with. What is there already and still fits its pins is kept, so an interrupted run goes on where it
# was. Everything else (runc, CNI plugins, nft) is the distribution's.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. deploy/steps.sh

here=tests/e2e/cluster
cache=${ZEROWAKE_CLUSTER_CACHE:-$HOME/.cache/zerowake-cluster}
bin=$cache/bin
mkdir -p "$bin" "$cache/images"

[ "$(id -u)" = 0 ] || fail "a cluster needs root: it makes namespaces, mounts and control groups." "Run: sudo make cluster"
exec 9>"$cache/.building"
flock -n 9 || { echo "  another run is building into $cache: waiting for it"; flock 9; }

need runc containernetworking-plugins nftables iproute2 util-linux mount

pinned() { # MODULE-FOLDER MODULE: the version that its go.mod requires
    awk -v module="$2" '$1 == "require" && $2 == module { print $3 } $1 == module && NF > 1 && $2 ~ /^v/ { print $2 }' "$here/modules/$1/go.mod" | head -n 1
}

# A Go that can read these go.mod files; from 1.21 on it brings the very version that they name.
go_path() {
    if go version 2>/dev/null | grep -qE 'go1\.(2[1-9]|[3-9][0-9])'; then command -v go; else echo "$cache/go/bin/go"; fi
}

# Debugging information is left out where it would be made, and the compiler's memory is reclaimed less often: a third of its time.
compile() { # FOLDER LINKER-FLAGS TAGS NAME=PACKAGE…
    local folder=$1 flags=$2 tags=$3 go one package
    go=$(go_path)
    shift 3
    cd "$here/modules/$folder"
    echo "packages $("$go" list -deps -tags "$tags" "${@#*=}" | wc -l)"
    rm -rf "$bin/.$folder.new"
    GOGC=400 CGO_ENABLED=0 "$go" build -v -mod=readonly -trimpath -tags "$tags" -gcflags=all=-dwarf=false -ldflags "-s -w $flags" \
        -o "$bin/.$folder.new/" "${@#*=}"
    for one; do # Go names a program by its package: the last part of its path, a version excepted
        package=${one#*=}
        mv "$bin/.$folder.new/$(sed -E 's:/v[0-9]+$::; s:.*/::' <<<"${package/#./$folder}")" "$bin/${one%%=*}"
    done
    rmdir "$bin/.$folder.new"
}

compile_progress() { awk '$1 == "packages" { total = $2 } /^[a-z0-9.]+(\/|$)/ { done++ } END { print done + 0, total + 0 }'; }

# All programs of a module in one run of Go, which links one while it compiles the next.
build() { # FOLDER LINKER-FLAGS TAGS NAME=PACKAGE…
    local key one missing=
    key=$({ cat "$here/modules/$1"/*; echo "$@"; } | sha256sum | cut -c1-16)
    for one in "${@:4}"; do [ -x "$bin/${one%%=*}" ] || missing=yes; done
    [ -z "$missing" ] && [ "$(cat "$bin/.$1.key" 2>/dev/null)" = "$key" ] && return
    [ -x "$(go_path)" ] || step "fetching Go" unknown .venv/bin/python -m tests.e2e.cluster.toolchain "$cache/go"
    step "building $1, programs: $(($# - 3))" compile_progress compile "$@"
    echo "$key" >"$bin/.$1.key"
}

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
    module=$(cd "$here/modules/keda" && $(go_path) list -m -f '{{.Dir}}' github.com/kedacore/keda/v2)
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
