# `. FOLDER/unpack.sh`, FOLDER as pack.sh made it: unpacks it into GPU_BENCH (/tmp/gpu-bench) unless that was done, and sets what is to be set.
# Parts may come one after the other into FOLDER. Until all are there it says which are missing.
GPU_BENCH=${GPU_BENCH:-/tmp/gpu-bench}
_from=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -e "$GPU_BENCH/done" ]; then
    if (cd "$_from" && sha256sum --check --quiet parts.sha256); then
        mkdir -p "$GPU_BENCH"
        if command -v xz >/dev/null; then _xz=(xz -dc -T0); else _xz=(python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer, 1 << 20)'); fi
        cat "$_from"/part.* | "${_xz[@]}" | tar -C "$GPU_BENCH" -xf - && touch "$GPU_BENCH/done"
    fi
fi
export PATH=$GPU_BENCH/bin:$PATH PYTHONPATH=$GPU_BENCH/packages ZEROWAKE_VLLM_SITE=$GPU_BENCH/vllm HF_HUB_OFFLINE=1
