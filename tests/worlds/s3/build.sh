#!/usr/bin/env bash
# Brings the S3 server that tests speak to: the Versity gateway, which serves a folder, built from a pinned Go module.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. tests/worlds/programs.sh s3

build versitygw "" "" versitygw=github.com/versity/versitygw/cmd/versitygw
