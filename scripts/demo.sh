#!/usr/bin/env bash
# The whole of DPMambaIR at small scale on two CPU cores in less than ten minutes: data from photographs that come with
# scikit-image and scikit-learn, stage 1, stage 2, test, table and picture. Writes under datasets/, experiments/, results/.
source "$(dirname "$0")/setup_env.sh"
python scripts/make_demo_data.py --output datasets/demo
python -m dpmambair_basicsr.train -opt options/demo_degradation_extractor.yml
python -m dpmambair_basicsr.train -opt options/demo_dpmambair.yml
python -m dpmambair_basicsr.test -opt options/demo_test_dpmambair.yml
python scripts/demo_report.py
