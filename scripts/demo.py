"""Small-scale DPMambaIR on two CPU cores in about a quarter of an hour, on any system: `python scripts/demo.py`.

Prepares data from photographs in scikit-image and scikit-learn, runs stage 1, stage 2 and the test, and writes a table
and a picture, below datasets/, experiments/, results/. `bash scripts/demo.sh` also sets up the environment.
"""

import subprocess
import sys
from pathlib import Path

STEPS = """
scripts/make_demo_data.py --output datasets/demo
-m dpmambair_basicsr.train -opt options/demo_degradation_extractor.yml
-m dpmambair_basicsr.train -opt options/demo_dpmambair.yml
-m dpmambair_basicsr.test -opt options/demo_test_dpmambair.yml
scripts/demo_report.py
"""


def main() -> int:
    """Returns the exit status of the step that failed, or 0."""
    checkout = Path(__file__).parents[1]
    for step in STEPS.strip().splitlines():
        status = subprocess.run([sys.executable, *step.split()], cwd=checkout).returncode
        if status:
            return status
    return 0


if __name__ == '__main__':
    sys.exit(main())
