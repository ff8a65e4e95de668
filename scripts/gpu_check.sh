#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, in ten minutes: run the tests that need one, then regenerate the tables of docs/benchmarks.md#gpus.
#   bash scripts/gpu_check.sh [Restormer's restormer_arch.py]
# Uses PYTHON (default: python3) with PyTorch's CUDA build, this package's requirements, BasicSR and pytest; needs neither git nor
# network access. mamba_ssm is measured too if it is installed, Restormer if its file (which needs einops) is given.
set -euo pipefail
restormer="${1:+$(realpath "$1")}"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
"$python" -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu_check: PyTorch finds no CUDA device')"
failed=0
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)  # most of the time is spent compiling, on the CPU
"$python" -m pytest -q "${workers[@]}" tests/ops tests/test_cuda_graph.py tests/test_tile_graphs.py || failed=1
if command -v compute-sanitizer >/dev/null; then  # comes with CUDA's toolkit
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q \
            tests/ops/test_cuda_backend.py tests/ops/test_pixels.py -k 'agrees_with_the_ or sequences_agree_with_the_definition' ||
            failed=1
    done
fi
"$python" benchmarks/gpu.py ${restormer:+--restormer "$restormer"} || failed=1
exit "$failed"
