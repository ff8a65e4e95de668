#!/usr/bin/env bash
# Set up the environment, check style, imports and types, and run the tests. Arguments go to pytest: bash scripts/test.sh -k scan
source "$(dirname "$0")/setup_env.sh"
ruff check .
ruff format --check .
lint-imports --no-cache
python scripts/check_types.py
export OMP_NUM_THREADS=1  # one test process per core
exec python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
