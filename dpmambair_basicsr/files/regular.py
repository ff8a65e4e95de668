"""Open regular files only: reading a FIFO could block forever, and /dev/zero never ends."""

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, opened for reading.

    Raises:
        OSError: it cannot be opened.
        ValueError: naming it, if it is not a regular file.
    """
    stream = open(path, 'rb', opener=open_without_waiting)  # noqa: SIM115  (returned)
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError(f'{path}: not a regular file')
    return stream


def check_regular(path: str | Path) -> None:
    """For libraries that open files themselves. Raises as `open_regular` does."""
    open_regular(path).close()


def open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))
