"""Files that are never seen half written, and their checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A path beside `file` to write to; it takes the place of `file` at the end, or goes if an exception is raised."""
    file = Path(file)
    part = file.with_name(f'.{file.name}.{os.getpid()}.part')
    try:
        yield part
        with open(part, 'rb+') as stream:
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def sha256(file: str | Path) -> str:
    """The checksum that `sha256sum` prints."""
    checksum = hashlib.sha256()
    with open(file, 'rb') as stream:
        while block := stream.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()
