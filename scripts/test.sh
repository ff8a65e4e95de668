#!/usr/bin/env bash
# Sets up the environment, checks style, imports and types, and runs the tests. Arguments go to pytest: bash scripts/test.sh -k scan
source "$(dirname "$0")/setup_env.sh"
ruff check .
ruff format --check .
lint-imports --no-cache
python scripts/check_types.py
export OMP_NUM_THREADS=1  # a process for each core runs the tests
exec python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
