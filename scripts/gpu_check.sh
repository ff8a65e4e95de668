#!/usr/bin/env bash
# Ten minutes on a machine with an NVIDIA GPU: the tests that need one, then the tables of docs/benchmarks.md#gpus anew.
#   bash scripts/gpu_check.sh [Restormer's restormer_arch.py]
# Takes PYTHON (default: python3) with PyTorch's CUDA build, this package's requirements, BasicSR and pytest; neither git
# nor a network. mamba_ssm is measured beside where it is installed, Restormer where its file (which needs einops) is named.
set -euo pipefail
restormer="${1:+$(realpath "$1")}"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
"$python" -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu_check: PyTorch finds no CUDA device')"
failed=0
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)  # most of the time is compiling, on the CPU
"$python" -m pytest -q "${workers[@]}" tests/ops || failed=1
if command -v compute-sanitizer >/dev/null; then  # comes with CUDA's toolkit
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q \
            tests/ops/test_cuda_backend.py -k 'agrees_with_the_parts or sequences_agree_with_the_definition' || failed=1
    done
fi
"$python" benchmarks/gpu.py ${restormer:+--restormer "$restormer"} || failed=1
exit "$failed"
