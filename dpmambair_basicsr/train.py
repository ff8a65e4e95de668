"""Train with BasicSR's own loop and arguments: `python -m dpmambair_basicsr.train -opt options/train_<what>.yml`.

Writes to ./experiments and ./tb_logger: the current directory is BasicSR's root_path. For `--auto_resume` from another
directory name the run's own in the option file, path.experiments_root.
"""

from pathlib import Path

import dpmambair_basicsr.training.huge_pages  # before PyTorch

# isort: split
from basicsr.train import train_pipeline


def main() -> None:
    dpmambair_basicsr.register()  # here a failure to register is an error, not a warning
    train_pipeline(str(Path.cwd()))


if __name__ == '__main__':
    main()
