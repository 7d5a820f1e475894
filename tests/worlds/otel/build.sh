#!/usr/bin/env bash
# Brings a collector of OpenTelemetry's, built from pinned Go modules with what tests need of it (collector/main.go). Once, into the cache of
# the test cluster's programs; then this costs milliseconds.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. deploy/steps.sh

modules=tests/worlds/otel
cache=${ZEROWAKE_CLUSTER_CACHE:-$HOME/.cache/zerowake-cluster}
bin=$cache/otel
mkdir -p "$bin"
exec 9>"$bin/.building"
flock -n 9 || { echo "  another run is building into $bin: waiting for it"; flock 9; }
. tests/e2e/cluster/go.sh

build collector "" "" collector=.
