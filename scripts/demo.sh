#!/usr/bin/env bash
# Set up the environment and run the demo, see demo.py: both stages of DPMambaIR on two CPU cores in less than ten minutes.
source "$(dirname "$0")/setup_env.sh"
exec python scripts/demo.py
