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
"$python" -m pytest -q tests/ops || failed=1
"$python" benchmarks/gpu.py ${restormer:+--restormer "$restormer"} || failed=1
exit "$failed"
