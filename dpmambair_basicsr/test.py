"""Test with BasicSR's own loop and arguments: `python -m dpmambair_basicsr.test -opt options/test_<what>.yml`.

Writes to ./results: the current directory is BasicSR's root_path.
"""

from pathlib import Path

import dpmambair_basicsr.training.huge_pages  # noqa: F401  (before PyTorch)

# isort: split
from dpmambair_basicsr import registration
from dpmambair_basicsr.files import lock


def main() -> None:
    try:
        run = registration.pipeline('test')
    except ImportError as error:
        raise SystemExit(f'dpmambair_basicsr.test: {error}') from None
    try:
        run(str(Path.cwd()))
    except lock.LockedFolderError as error:
        raise SystemExit(str(error)) from None
    finally:
        lock.release()


if __name__ == '__main__':
    main()
