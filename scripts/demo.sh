#!/usr/bin/env bash
# Set up the environment and run the demo, see demo.py: both stages of DPMambaIR on two CPU cores in about a quarter of an hour.
source "$(dirname "$0")/setup_env.sh"
exec python scripts/demo.py
