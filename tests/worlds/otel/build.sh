#!/usr/bin/env bash
# Brings a collector of OpenTelemetry's, built from pinned Go modules with what tests need of it (collector/main.go).
set -euo pipefail
cd "$(dirname "$0")/../../.."
. tests/worlds/programs.sh otel

build collector "" "" collector=.
