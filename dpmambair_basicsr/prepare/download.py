"""Read-only access to a download, folder or archive, as a tree of files."""

import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.errors import InputError
from dpmambair_basicsr.files.image_folders import EXTENSIONS

UNREADABLE = (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """`replacing`, creating the target's folder; not durable, as the journal records the sizes of the files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, durable=False) as part:
        yield part


class Download:
    """A folder or an archive. `names` are its images, {path matched by patterns: name inside}, in archive order.

    Raises:
        InputError: no such folder or archive, or it cannot be read.
    """

    def __init__(self, path: Path):
        self.path, self.archive, self.sizes = path, None, {}
        try:
            if path.is_dir():
                found = (Path(folder, file) for folder, _, files in os.walk(path, followlinks=True) for file in files)
                names = [file.relative_to(path).as_posix() for file in found]
            elif zipfile.is_zipfile(path):
                self.archive = zipfile.ZipFile(path)
                names = self.sizes = {info.filename: info.file_size for info in self.archive.infolist()}
            elif path.is_file() and tarfile.is_tarfile(path):
                self.archive = tarfile.open(path)  # noqa: SIM115  (read from until the program ends)
                self.members = {info.name: info for info in self.archive if info.isfile()}
                names = self.sizes = {name: info.size for name, info in self.members.items()}
            elif path.exists():
                raise InputError(f'{path} is neither a folder nor a zip or tar archive (rar, 7z: unpack it first)')
            else:
                raise InputError(f'{path} does not exist')
        except UNREADABLE as error:
            raise InputError(f'{path} cannot be read: {error}') from error
        root = re.sub(r'(\.tar(\.\w+)?|\.tgz|\.zip)$', '', path.as_posix())
        self.names = {f'{root}/{name.removeprefix("./")}': name for name in names if is_image(name)}
        self.order = {name: position for position, name in enumerate(self.names.values())}

    def open_member(self, name: str) -> IO[bytes]:
        if isinstance(self.archive, zipfile.ZipFile):
            return self.archive.open(name)
        assert isinstance(self.archive, tarfile.TarFile), 'folders have files, not members'
        member = self.archive.extractfile(self.members[name])
        assert member is not None, '`members` are files'
        return member

    def extract(self, name: str, target: Path) -> None:
        if is_file(target, self.sizes[name]):
            return
        with self.open_member(name) as member, whole(target) as temporary, temporary.open('wb') as file:
            shutil.copyfileobj(member, file)


def is_image(name: str) -> bool:
    """Whether a name is that of an image; excludes hidden files and those that macOS adds to archives."""
    parts = name.removeprefix('./').split('/')
    return name.lower().endswith(EXTENSIONS) and not any(part.startswith('.') or part == '__MACOSX' for part in parts)


def is_file(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def fetch(source: Path, target: Path, copy: bool) -> None:
    """Link or copy a file, unless already done."""
    if copy:
        state = source.stat()
        if target.is_symlink() or not is_file(target, state.st_size) or target.stat().st_mtime_ns != state.st_mtime_ns:
            with whole(target) as temporary:
                shutil.copy2(source, temporary)
    elif not target.is_symlink() or os.readlink(target) != str(source):
        with whole(target) as temporary:
            os.symlink(source, temporary)
