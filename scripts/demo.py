"""DPMambaIR at small scale on two CPU cores in less than ten minutes, on any system: `python scripts/demo.py`.

Data from photographs that come with scikit-image and scikit-learn, stage 1, stage 2, test, table and picture. Writes
under datasets/, experiments/, results/. `bash scripts/demo.sh` makes the environment first.
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
