#!/usr/bin/env bash
# Sourced by demo.sh and test.sh: creates a virtual environment once and activates it.
# DPMAMBAIR_VENV names it (default: .venv in the checkout), so that several checkouts can share one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${DPMAMBAIR_VENV:-$PWD/.venv}"
stamp="$venv/.dpmambair_basicsr"
recipe="$(cat pyproject.toml setup.py scripts/setup_env.sh | cksum)"

if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$recipe" ]; then
    echo "Setting up $venv (once; downloads about 5 GB if PyTorch is not installed yet)"
    python3 -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, python3 is %d.%d" % sys.version_info[:2])'
    python3 -m venv "$venv"
    install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
    install --editable '.[test]'
    "$venv/bin/python" -c 'import importlib.metadata as m; m.version("basicsr")' 2>/dev/null ||
        "$venv/bin/python" -m dpmambair_basicsr install_basicsr --quiet --disable-pip-version-check
    echo "$recipe" > "$stamp"
fi
export PATH="$venv/bin:$PATH"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # this checkout, even if the environment was created for another one
