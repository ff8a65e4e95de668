"""Files that are written atomically, never seen incomplete, and their checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(file: str | Path, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A path beside `file` to write to; it takes the place of `file` at the end, or goes if an exception is raised.

    What a killed process leaves behind has the same name each time: the next one overwrites it.

    Args:
        durable: then content and name are on the disk, so that a power cut leaves the old file or the new one. False
            for what is cheaply made again.
        shared: other processes may write the same file at the same time; the last one counts.
    """
    file = Path(file)
    part = file.with_name(f'.{file.name}.{os.getpid()}.part' if shared else f'.{file.name}.part')
    part.unlink(missing_ok=True)  # it may be a link, through which would be written
    try:
        yield part
        if durable:
            sync(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    if durable:
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
