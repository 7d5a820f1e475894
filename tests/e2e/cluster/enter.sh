#!/bin/sh
# sh enter.sh TARGET COMMAND…: runs a command as root in the packed root below TARGET (pack.py), with the machine's own file system at
# /machine. It has the machine's processes, devices, network and control groups, and mounts of its own, which end with it; a cluster that it
# starts goes on, and is found by the next one. OUT, where it is set, is a folder of the machine for what is to be kept.
set -eu
target=$(cd "$1" && pwd)
shift
[ "$(id -u)" = 0 ] || { echo "the cluster needs root: it makes namespaces, mounts and control groups" >&2; exit 1; }
[ -e "$target/root/zerowake" ] || { echo "$target/root is not there: sh unpack.sh FROM $target first" >&2; exit 1; }
[ -z "${OUT:-}" ] || OUT=/machine$(cd "$OUT" && pwd)
export OUT=${OUT:-}
exec unshare --mount sh -euc '
    root=$1
    shift
    mount --make-rprivate /
    mount --rbind "$root" "$root" # with what the machine has mounted below it
    cd "$root"
    mkdir -p machine proc sys dev run tmp
    mount --rbind /proc proc
    mount --rbind /sys sys
    mount --rbind /dev dev
    mount -t tmpfs -o mode=755 tmpfs run
    # Where a machine has none, as some containers: version 2 needs no more than that.
    [ -n "$(ls sys/fs/cgroup)" ] || mount -t cgroup2 none sys/fs/cgroup
    pivot_root . machine
    cd /zerowake
    exec chroot / env -i PATH=/opt/zerowake/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        PYTHONUNBUFFERED=1 ZEROWAKE_CLUSTER_CACHE=/cluster OUT="$OUT" LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}" \
        sh -c "cd /zerowake && exec \"\$@\"" sh "$@"
' sh "$target/root" "$@"
