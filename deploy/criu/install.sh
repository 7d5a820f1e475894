#!/usr/bin/env bash
# Brings a CRIU that works with current kernels (4.2 or later): the one on PATH, else the distribution's package, else one built from the
# pinned source into .venv/bin, where the restore agent looks first. The source comes from the archive that apt is configured for, through
# apt's own downloader, and is checked against the pinned hash; system libraries are not touched. It is linked statically, to be run inside
# any container, and so without nftables (Debian has no static library of it), which restores here do not use.
# OURS=yes builds it whatever else is there.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/steps.sh

least=4.2
pinned=4.2.1
sha256=29ec0ee09e296479fe7048c80980e8ef1d0684d0b0204c2b101dfea19f6725b9
tarball=criu_$pinned.orig.tar.xz
objects=208 # that the pinned version compiles, for the bar
cache=.cache/criu

new_enough() { # VERSION
    [ -n "$1" ] && [ "$(printf '%s\n%s\n' "$least" "$1" | sort -V | head -n 1)" = "$least" ]
}
version_of() { "$1" --version 2>/dev/null | sed -n 's/^Version: //p'; }
checks_out() { echo "$sha256  $cache/$tarball" | sha256sum --check --status 2>/dev/null; }

found() { # PATH
    printf '  CRIU %s: %s\n' "$(version_of "$1")" "$1"
    local program
    program=$(readlink -f "$1")
    if [ "$(id -u)" = 0 ] && ! (cd "$logs" && "$program" check >criu-check.log 2>&1); then
        printf '  but `criu check` fails on this kernel, so engines will start cold here:\n' >&2
        tail -n 3 "$logs/criu-check.log" >&2
    fi
    exit 0
}

fetch() {
    checks_out && return
    mkdir -p "$cache"
    local archive part
    for archive in $(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | sort -u); do
        for part in main universe; do
            echo "trying $archive, $part"
            /usr/lib/apt/apt-helper download-file "${archive%/}/pool/$part/c/criu/$tarball" "$cache/$tarball" "SHA256:$sha256" && return
        done
    done
    echo "none of the archives that apt is configured for has $tarball."
    echo "Install CRIU $least or later so that it is on PATH, or put that file into $cache/, and run make again."
    return 1
}

build_progress() { awk -v total="$objects" '/^ +CC / { done++ } END { print done + 0, total }'; }

build() {
    local tree=$cache/criu-$pinned
    rm -rf "$tree"
    tar -C "$cache" -xf "$cache/$tarball"
    # RUNDIR: what it knows of this kernel lies where it is started, which the agent chooses; /run may be a container's, which its tenant fills.
    MAKEFLAGS="" make -C "$tree" -j"$(nproc)" criu NO_GNUTLS=1 RUNDIR=. "PKG_CONFIG=pkg-config --static"
    install -D "$tree/criu/criu" .venv/bin/criu.new
    .venv/bin/criu.new --version
    mv .venv/bin/criu.new .venv/bin/criu
    rm -rf "$tree"
}

[ -n "${OURS:-}" ] || for candidate in .venv/bin/criu "$(command -v criu || true)"; do
    new_enough "$(version_of "$candidate")" && found "$candidate"
done

command -v apt-get >/dev/null || fail "CRIU $least or later is not on PATH, and this machine has no apt-get to bring it with." \
    "Install CRIU $least or later with this distribution's own tools and run make again."
packaged() { apt-cache policy criu | sed -n 's/^ *Candidate: //p' | grep -v none || true; }
[ -n "$(packaged)" ] || [ "$(id -u)" != 0 ] || refresh
if [ -z "${OURS:-}" ] && new_enough "$(packaged)"; then
    need criu
    found "$(command -v criu)"
fi

need gcc make pkg-config xz-utils libc6-dev libprotobuf-c-dev libprotobuf-dev protobuf-c-compiler protobuf-compiler \
    libnl-3-dev libnet1-dev libcap-dev libbsd-dev uuid-dev
export LDFLAGS=-static
[ "$(id -u)" = 0 ] || [ -n "$(apt-get indextargets 'Created-By: Packages')" ] || fail "the package lists are empty." "Run: sudo apt-get update"
step "fetching the source of CRIU $pinned" unknown fetch
step "building CRIU $pinned" build_progress build
found .venv/bin/criu
