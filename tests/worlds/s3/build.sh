#!/usr/bin/env bash
# Brings the S3 server that tests speak to: the Versity gateway, which serves a folder, built from a pinned Go module. Once, into the cache
# of the test cluster's programs; then this costs milliseconds.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. deploy/steps.sh

modules=tests/worlds/s3
cache=${ZEROWAKE_CLUSTER_CACHE:-$HOME/.cache/zerowake-cluster}
bin=$cache/s3
mkdir -p "$bin"
exec 9>"$bin/.building"
flock -n 9 || { echo "  another run is building into $bin: waiting for it"; flock 9; }
. tests/e2e/cluster/go.sh

build versitygw "" "" versitygw=github.com/versity/versitygw/cmd/versitygw
