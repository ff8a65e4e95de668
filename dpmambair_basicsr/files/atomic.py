"""Files that are never seen half written, and their checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A path beside `file` to write to; it takes the place of `file` at the end, or goes if an exception is raised.

    Then content and name are on the disk, so that a power cut leaves the old file or the new one. What a killed process
    leaves behind has the same name each time: the next one overwrites it. Not for two processes that write one file.
    """
    file = Path(file)
    part = file.with_name(f'.{file.name}.part')
    try:
        yield part
        sync(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # the file is there; not every file system can do this with folders
        sync(file.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk; where the system opens folders."""
    if os.name != 'posix':
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: str | Path) -> str:
    """The checksum that `sha256sum` prints."""
    checksum = hashlib.sha256()
    with open(file, 'rb') as stream:
        while block := stream.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()
