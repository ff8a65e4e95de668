"""Selects the image and video files a command reads and the paths of its results. No file is opened."""

import glob
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dpmambair_basicsr.files.atomic import check_folder
from dpmambair_basicsr.files.errors import InputError
from dpmambair_basicsr.files.pictures import EXTENSIONS, FORMATS
from dpmambair_basicsr.files.videos import VIDEOS

RESTORED = (*EXTENSIONS, *VIDEOS)
SUB_FOLDERS = 'sub-folders'
COMPARE = 'compare'  # the folder, in that of the results, of pictures beside their results


@dataclass
class Plan:
    """
    Attributes:
        jobs: (picture, result), each picture once.
        folder: contains all results, possibly in sub-folders.
        skipped: number of files in the searched folders, by extension, that are not in `RESTORED`, and of sub-folders
            that were not searched, `SUB_FOLDERS`.
    """

    jobs: list[tuple[Path, Path]]
    folder: Path
    skipped: Counter = field(default_factory=Counter)

    def beside(self, target: Path) -> Path:
        """Where a picture and its result are written side by side."""
        return self.folder / COMPARE / target.relative_to(self.folder)

    def skipped_summary(self) -> str:
        files = {kind: count for kind, count in self.skipped.items() if kind != SUB_FOLDERS}
        counts = ', '.join(f'{count} {kind}' for kind, count in sorted(files.items()))
        parts = [f'skipped, unsupported format: {counts}'] if files else []
        if folders := self.skipped[SUB_FOLDERS]:
            parts.append(f'{folders} sub-folder{"s" if folders > 1 else ""} not searched, which -r does')
        return '; '.join(parts)


def plan(
    inputs: list[str],
    output: Path,
    suffix: str = '',
    extension: str | None = None,
    recursive: bool = False,
    compare: bool = False,
) -> Plan:
    """What to restore, in the order of the arguments.

    Args:
        inputs: files, folders, patterns. With `recursive`, or below `**`, results keep the folder structure.
        output: a folder or, for a single picture, a file with a supported extension.
        suffix: added to the names of the results.
        extension: of the results; None: the same as the picture's.
        compare: whether pictures are written beside their results, too.

    Raises:
        InputError: an argument without pictures, two pictures with the same result, a result that would overwrite a
            picture, or an unusable output.
    """
    is_file = output.suffix.lower() in (*FORMATS, *VIDEOS) and not output.is_dir()
    result = Plan([], output.parent if is_file else output)
    sources = {}  # result -> picture
    for argument in inputs:
        found = find(argument, recursive, result.skipped, output, RESTORED)
        if not found:
            skipped = f'; {result.skipped_summary()}' if result.skipped else ''
            raise InputError(f'{nothing_found(argument)}{skipped}')
        for source, below in found:
            is_video = source.suffix.lower() in VIDEOS
            if is_file and is_video != (output.suffix.lower() in VIDEOS):
                raise InputError(f'{output}: {source} is a {"video" if is_video else "picture"}; expected such a file')
            kind = source.suffix if is_video else extension or source.suffix
            target = output if is_file else output / below / f'{source.stem}{suffix}{kind}'
            other = sources.setdefault(target, source)
            if not same_file(other, source):
                reason = 'use a folder' if is_file else 'use -r to keep sub-folders, or --suffix'
                raise InputError(f'{target}: would be the result of both {other} and {source}; {reason}')
    pictures = {source.resolve() for source in sources.values()}
    pairs = sources.items() if compare else ()
    besides = [result.beside(target) for target, source in pairs if source.suffix.lower() not in VIDEOS]
    for target in [*sources, *besides]:
        if target.resolve() in pictures:
            raise InputError(f'{target}: would overwrite an input; choose another -o, or a --suffix')
    for beside in besides:
        if beside in sources:
            raise InputError(f'{beside}: would be a result and what --compare writes; leave {sources[beside]} out')
    if is_file and (extension or output.suffix).lower() != output.suffix.lower():
        raise InputError(f'{output}: must have the extension of --ext {extension}')
    check_folder(result.folder, 'a folder or one picture')
    result.jobs = [(source, target) for target, source in sources.items()]
    return result


def nothing_found(argument: str) -> str:
    """The message for an argument without pictures."""
    is_there = Path(argument).exists() or glob.has_magic(argument)
    return f'{argument}: {"no pictures found" if is_there else "no such file or folder"}'


def find(
    argument: str, recursive: bool, skipped: Counter, output: Path, extensions: tuple[str, ...]
) -> list[tuple[Path, Path]]:
    """(picture, sub-folder of its result) pairs of a file, folder or pattern; `output` is not searched."""
    path = Path(argument)
    if path.is_dir():
        return in_folder(path, recursive, skipped, output, extensions)
    if path.exists():
        return [(path, Path())]
    found = []
    start = Path(*Path(argument.partition('**')[0] + 'x').parts[:-1]) if '**' in argument else None
    for match in map(Path, sorted(glob.glob(argument, recursive=True))):
        files = (
            [file for file, _ in in_folder(match, False, skipped, output, extensions)] if match.is_dir() else [match]
        )
        found += [(file, Path() if start is None else file.parent.relative_to(start)) for file in files]
    return found


def in_folder(
    folder: Path, recursive: bool, skipped: Counter, output: Path, extensions: tuple[str, ...]
) -> list[tuple[Path, Path]]:
    found, seen = [], set()
    for name, folders, files in os.walk(folder, followlinks=True):
        here = Path(name)
        seen.add(here.resolve())
        visible = (here / part for part in sorted(folders) if part[0] != '.')
        parts = [part for part in visible if part.resolve() not in seen | {output.resolve()}]
        if parts and not recursive:
            skipped[SUB_FOLDERS] += len(parts)
        folders[:] = [part.name for part in parts] if recursive else []
        for file in sorted(here / part for part in files if part[0] != '.'):
            if file.suffix.lower() in extensions:  # including broken links, which will be reported
                found.append((file, here.relative_to(folder)))
            else:
                skipped[file.suffix.lower() or 'without extension'] += 1
    return found


def list_pictures(argument: str) -> list[Path]:
    """The file, the pictures directly in the folder (by extension, hidden files left out), or the matches."""
    return [file for file, _ in find(argument, False, Counter(), Path(), EXTENSIONS)]


def same_file(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()
