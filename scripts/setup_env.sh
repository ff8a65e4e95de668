#!/usr/bin/env bash
# Sourced by demo.sh and test.sh: makes a virtual environment once and activates it.
# DPMAMBAIR_VENV names it (default: .venv in the checkout), so that several checkouts can share one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${DPMAMBAIR_VENV:-$PWD/.venv}"
stamp="$venv/.dpmambair_basicsr"
recipe="$(cat pyproject.toml setup.py scripts/setup_env.sh | cksum)"

if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$recipe" ]; then
    echo "Setting up $venv (once; downloads about 5 GB where PyTorch is not there yet)"
    python3 -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 12) or sys.exit(
        "Python 3.10, 3.11 or 3.12 is needed, python3 is %d.%d: BasicSR 1.4.2 cannot be built on 3.13" % sys.version_info[:2])'
    python3 -m venv "$venv"
    install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
    install 'setuptools>=77' wheel cython
    install --no-build-isolation --editable '.[test]'
    # basicsr is a source distribution: isolated builds would fetch a second PyTorch, and its requirement tb-nightly is not needed.
    "$venv/bin/python" -c 'import importlib.metadata as m; m.version("basicsr")' 2>/dev/null ||
        install --no-build-isolation --no-deps basicsr==1.4.2
    echo "$recipe" > "$stamp"
fi
export PATH="$venv/bin:$PATH"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # this checkout, whichever one the environment was made for
