"""Train with BasicSR's own loop and arguments: `python -m dpmambair_basicsr.train -opt options/train_<what>.yml`.

Writes to ./experiments and ./tb_logger: the current directory is BasicSR's root_path. To use `--auto_resume` from
another directory, set path.experiments_root in the option file to the run's.
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
        with exit_on_error('dpmambair_basicsr.train'):
            find_option_file()
            registration.pipeline('train')(str(Path.cwd()))
    finally:
        lock.release()


if __name__ == '__main__':
    main()
