"""Image lists (BasicSR's meta-info files), which select the images of a dataset; all of them must exist."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from os import path as osp
from pathlib import Path

from dpmambair_basicsr.files.image_folders import EXTENSIONS, check_inside, some


def listed_names(file: str) -> list[str]:
    """The names in a list of images (meta-info), a line each: `name`, or `name (height,width,channels) ...`.

    Raises:
        ValueError: it is not text in UTF-8, with or without a byte order mark.
        OSError: it cannot be read.
    """
    try:
        lines = Path(file).read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'{file}: not text in UTF-8: {error.reason}') from None
    names = [re.sub(r'\s+\(\d+(,\s*\d+){1,2}\)(\s.*)?$', '', line).strip() for line in lines]
    return [name for name in names if name]


def list_keys(folder: str) -> dict[str, str]:
    """Keys of the images in an lmdb folder, {key: key}, sorted: the names of its meta_info.txt without extension.

    Raises:
        ValueError: its name does not end in .lmdb, or two images have one key.
        OSError: it has no meta_info.txt.
    """
    if not folder.endswith('.lmdb'):
        raise ValueError(f'{folder}: the name of an lmdb folder must end in .lmdb')
    keys = [osp.splitext(name)[0] for name in listed_names(osp.join(folder, 'meta_info.txt'))]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f'{folder}: meta_info.txt has duplicate keys: {some(twice)}')
    return {key: key for key in sorted(keys)}


def listed_images(file: str, folder: str) -> list[str]:
    """The paths of the images in a list, all of which exist. A name ends at the first space only if necessary.

    Raises:
        ValueError: a name without a file, or outside the folder; and as `listed_names`.
    """
    names, files = listed_names(file), FilesByFolder()
    check_inside(folder, (osp.join(folder, name) for name in names))
    paths, missing = [], []
    for name in names:
        candidates = [osp.join(folder, part) for part in (name, name.split(' ')[0])]
        path = next((path for path in candidates if osp.basename(path) in files[osp.dirname(path)]), None)
        paths.append(path)
        missing += [name] if path is None else []
    if missing:
        raise ValueError(f'{file}: names images that are not in {folder}: {some(missing)}')
    return paths


def listed_pairs(file: str, lq: str, gt: str, filename_tmpl: str = '{}') -> list[dict[str, str]]:
    """Pairs of a list of GT images with LQ images: the file `filename_tmpl.format(stem)` in the folder `lq` itself.

    It has the extension of the GT image, or another if exactly one image has that name.

    Raises:
        ValueError: an image without a partner, or two that share one; and as `listed_images`.
    """
    paths, files, by_stem, partners = listed_images(file, gt), FilesByFolder()[lq], defaultdict(list), {}
    for name in files:
        if osp.splitext(name)[1].lower() in EXTENSIONS:
            by_stem[osp.splitext(name)[0]].append(name)
    for path in paths:
        stem, extension = osp.splitext(osp.basename(path))
        name = filename_tmpl.format(stem) + extension
        partners[path] = [name] if name in files else by_stem[filename_tmpl.format(stem)]
    if alone := [path for path, found in partners.items() if len(found) != 1]:
        raise ValueError(
            f'{file}: no image, or more than one, in {lq} (filename_tmpl {filename_tmpl!r}) for {some(alone)}'
        )
    if shared := [name for name, count in Counter(found[0] for found in partners.values()).items() if count > 1]:
        raise ValueError(f'{file}: images of several folders share an LQ image: {some(shared)}')
    return [{'lq_path': osp.join(lq, partners[path][0]), 'gt_path': path} for path in paths]


def missing_files(folder: str, paths: Iterable[str]) -> list[str]:
    """Paths of a dataset that are not files, and broken links in its folder, which a listing skips."""
    files = FilesByFolder()
    missing = [path for path in paths if osp.basename(path) not in files[osp.dirname(path)]]
    with os.scandir(folder) as entries:
        dead = {entry.path for entry in entries if entry.is_symlink() and not osp.exists(entry.path)}
    return [*missing, *sorted(dead.difference(missing))]


class FilesByFolder(dict):
    """{folder: names of the files in it}, read on access; broken links are not included."""

    def __missing__(self, folder: str) -> set[str]:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            return self.setdefault(folder, {entry.name for entry in entries if entry.is_file()})
        return self.setdefault(folder, set())
