#!/usr/bin/env bash
# The figures of a GPU, on a machine that has Python, PyTorch and transformers and nothing else of ours: exactness of
# the faster modes first, then speed, within ten minutes in all.
#
#     python -m bench.prepare_meta .bench/meta --python-version 3.12    # beforehand, where packages can be had
#     BENCH_COMMIT=$(git rev-parse --short=10 HEAD) OUT=out bash bench/gpu.sh [exactness|model|all] [options of bench.model]
set -uo pipefail
cd "$(dirname "$0")/.."

what="${1:-all}"
shift || true
out="${OUT:-bench/results}"
seconds="${BENCH_SECONDS:-570}"  # for everything; what does not fit is left out and named
export PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-/tmp/bench-inductor}"  # a second run compiles nothing
mkdir -p "$out"
nvidia-smi | tee "$out/gpu.txt"

if [ "$what" != model ]; then
    PYTHONPATH=.bench/meta timeout 150 python3 -m bench.exactness --device cuda 2>&1 | tee "$out/exactness.md"
fi
if [ "$what" != exactness ]; then
    meta=()
    [ -d .bench/meta ] && meta=(--meta .bench/meta)
    minutes=$(python3 -c "print(round(($seconds - $SECONDS) / 60, 2))")
    python3 -m bench.model --device cuda --minutes "$minutes" --out "$out" "${meta[@]}" "$@" 2>&1 | tee "$out/model.log"
fi
