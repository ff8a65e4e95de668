"""Copies our option files into a folder: `dpmambair init project`; then edit project/options/train_your_own.yml."""

import argparse
import sys
from pathlib import Path

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.errors import InputError, exit_on_error
from dpmambair_basicsr.files.option_files import packaged_files


def main() -> None:
    parser = argparse.ArgumentParser(prog='dpmambair init', description=(__doc__ or '').partition(':')[0] + '.')
    parser.add_argument('folder', type=Path, help='options/ is created in it; existing files are not replaced')
    folder = parser.parse_args().folder / 'options'
    with exit_on_error('dpmambair init', OSError):
        kept = copy_option_files(folder)
    if kept:
        sys.exit(f'dpmambair init: {folder}: not replaced, because they were changed: {", ".join(kept)}')


def copy_option_files(folder: Path) -> list[str]:
    """Writes missing option files, and returns the names of existing ones that differ.

    Raises:
        InputError: the path of the folder is a file.
        OSError: a file cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f'{folder} is not a folder')
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for source in packaged_files():
        target, content = folder / source.name, source.read_bytes()
        if not target.exists():
            with replacing(target) as part:
                part.write_bytes(content)
            print(f'wrote {target}')
        elif target.read_bytes() != content:
            kept.append(source.name)
    return kept


if __name__ == '__main__':
    main()
