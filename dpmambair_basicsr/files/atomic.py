"""Atomic file writes, checks that precede them, and checksums."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpmambair_basicsr.files.errors import InputError


@contextmanager
def replacing(file: str | Path, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `file` to write to; at the end it replaces `file`, after an exception it is deleted.

    A killed process always leaves the same name behind, so the next one overwrites it.

    Args:
        durable: flush content and name to the disk, so that a power cut leaves either the old file or the new one.
            False for files that are cheap to recreate.
        shared: other processes may write the same file at the same time; the last one wins.
    """
    file = Path(file)
    part = file.with_name(f'.{file.name}.{os.getpid()}.part' if shared else f'.{file.name}.part')
    part.unlink(missing_ok=True)  # it may be a link, which would be written through
    try:
        yield part
        if durable:
            sync(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    if durable:
        with suppress(OSError):  # the file is in place; not every file system can sync folders
            sync(file.parent)


def check_folder(folder: Path, wanted: str = 'a folder') -> None:
    """Raise InputError, up front, if a path is not a folder, or cannot be created or written to."""
    there = next(part for part in (folder, *folder.absolute().parents) if os.path.lexists(part))
    if not there.is_dir():
        raise InputError(f'{folder}: {"it" if there == folder else there} is a file; expected {wanted}')
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f'{folder}: {there} is not writable')


def check_file(file: str | Path) -> None:
    """Raise InputError, up front, if a file cannot be created or replaced, with its folder."""
    if Path(file).is_dir():
        raise InputError(f'{file}: is a folder; expected a file')
    check_folder(Path(file).parent)


def sync(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to the disk; only on systems that can open folders."""
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
