#!/usr/bin/env bash
# tests/bench/gpu/pack.sh OUT [BYTES]: what the benchmarks need on a GPU machine that reaches no registry, in parts of BYTES (60,000,000).
# That machine has Python 3.12 and torch 2.11 with what comes with it (transformers, Triton, CUDA's libraries). Packed are zerowake's wheel with
# what it and its tests need, CRIU, and vLLM 0.23.0 (vllm.txt: its packages) without what one GPU of the Hopper kind does not load.
# There `. OUT/unpack.sh`, in any shell and as often as you like, makes all of it usable; the first time all parts have to be there.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 1; }
mkdir -p "$1"
out=$(cd "$1" && pwd) bytes=${2:-60000000}
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../../.." && pwd)
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
uv=$root/.venv/bin/uv
[ -x "$uv" ] && [ -x "$root/.venv/bin/criu" ] || { echo "make demo first: it brings uv and CRIU" >&2; exit 1; }
for_there=(--quiet --link-mode copy --python-version 3.12 --python-platform x86_64-manylinux_2_39 --only-binary :all:)
packages=$work/packages vllm=$work/vllm
mkdir -p "$work/bin"
cp "$root/.venv/bin/criu" "$work/bin/"

"$uv" build --quiet --wheel --python "$root/.venv/bin/python" --out-dir "$work/wheel" "$root"
wheel=$(echo "$work"/wheel/*.whl)
"$uv" pip install "${for_there[@]}" --target "$packages" --constraint "$root/requirements.lock" \
    "zerowake[server,gpu,codings] @ file://$wheel" pytest pytest-asyncio hypothesis requests
rm -rf "$packages"/numpy* "$packages/bin" # torch's there

"$uv" pip install "${for_there[@]}" --no-deps --target "$vllm" --requirement "$here/vllm.txt" vllm==0.23.0
rm -rf "$vllm/vllm/vllm-rs" "$vllm/vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so" "$vllm"/mistral_common/data/tekken* "$vllm/bin"
find "$vllm" -path '*deep_gemm*' -name '*.so' ! -name '*312*' -delete
find "$work" \( -name '*.a' -o -name '*.pyx' -o -name '*.pxd' \) -delete
find "$work" -name __pycache__ -prune -exec rm -rf {} +
# Copied and not linked, or this would strip what other environments use.
find "$packages" "$vllm/xgrammar" "$work/bin" -type f \( -name '*.so*' -o -name criu \) -exec strip --strip-debug {} +

rm -f "$out"/part.*
tar -C "$work" -cf - bin packages vllm | xz --threads=0 -3 | split --numeric-suffixes --bytes="$bytes" - "$out/part."
(cd "$out" && sha256sum part.* >parts.sha256)
cp "$here/unpack.sh" "$out/"
du -ch "$out"/part.* | tail -1
