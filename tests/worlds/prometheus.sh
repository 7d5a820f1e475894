#!/usr/bin/env bash
# Brings the Prometheus that tests ask: Debian's package, unpacked into .cache/ and not installed, or its service would begin to run.
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/steps.sh

command -v prometheus >/dev/null || [ -x .cache/prometheus/usr/bin/prometheus ] && exit 0
command -v apt-get >/dev/null || fail "prometheus is not on this machine, and there is no apt-get to bring it." \
    "Install it with this distribution's own tools, then run make again."
[ "$(id -u)" = 0 ] && refresh
fetch() {
    rm -rf .cache/prometheus
    mkdir -p .cache/prometheus/package
    (cd .cache/prometheus/package && apt-get download prometheus)
    dpkg-deb -x .cache/prometheus/package/prometheus_*.deb .cache/prometheus
    rm -r .cache/prometheus/package
}
step "fetching Prometheus, for the tests" unknown fetch
