"""Test with BasicSR's own loop and arguments: `python -m dpmambair_basicsr.test -opt options/test_<what>.yml`.

Writes to ./results: the current directory is BasicSR's root_path.
"""

from pathlib import Path

import dpmambair_basicsr.training.huge_pages  # before PyTorch

# isort: split
from basicsr.test import test_pipeline


def main() -> None:
    dpmambair_basicsr.register()  # here a failure to register is an error, not a warning
    test_pipeline(str(Path.cwd()))


if __name__ == '__main__':
    main()
