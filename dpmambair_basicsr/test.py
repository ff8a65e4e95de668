"""Test with BasicSR's own loop and arguments: `python -m dpmambair_basicsr.test -opt options/test_<what>.yml`.

Writes to ./results: the current directory is BasicSR's root_path.
"""

from pathlib import Path

import dpmambair_basicsr.training.huge_pages  # noqa: F401  (before PyTorch)

# isort: split
from dpmambair_basicsr import registration
from dpmambair_basicsr.files import lock
from dpmambair_basicsr.files.errors import exit_on_error
from dpmambair_basicsr.training.command_line import find_option_file


def main() -> None:
    try:
        with exit_on_error('dpmambair_basicsr.test'):
            find_option_file()
            registration.pipeline('test')(str(Path.cwd()))
    finally:
        lock.release()


if __name__ == '__main__':
    main()
