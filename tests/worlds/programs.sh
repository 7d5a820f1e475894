# Sourced in the checkout, with the name of a folder beside this file: programs of its Go modules are built into the cache of the test cluster's
# programs, once; then this costs milliseconds. Gives `build` (tests/e2e/cluster/go.sh).
. deploy/steps.sh

modules=tests/worlds/$1
cache=${ZEROWAKE_CLUSTER_CACHE:-$HOME/.cache/zerowake-cluster}
bin=$cache/$1
mkdir -p "$bin"
exec 9>"$bin/.building"
flock -n 9 || { echo "  another run is building into $bin: waiting for it"; flock 9; }
. tests/e2e/cluster/go.sh
