"""Folders of image files: listing and pairing them by name, with errors that name the file. Nothing is opened."""

from collections.abc import Iterable
from os import path as osp
from pathlib import Path

EXTENSIONS = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


def list_images(folder: str) -> dict[str, str]:
    """Images directly in a folder, {stem: path}, sorted by stem. Hidden files and others (Thumbs.db) are passed over.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it, or two with one stem.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'image folder {folder} does not exist')
    images = {}
    for path in sorted(Path(folder).iterdir(), key=lambda path: (path.stem, path.suffix)):
        if path.name.startswith('.') or path.suffix.lower() not in EXTENSIONS or not path.is_file():
            continue
        if path.stem in images:
            raise ValueError(f'{folder} holds two images of one name: {Path(images[path.stem]).name} and {path.name}')
        images[path.stem] = str(path)
    if not images:
        raise ValueError(f'no image in folder {folder} (looked for {" ".join(EXTENSIONS)})')
    return images


def list_keys(folder: str) -> dict[str, str]:
    """Keys of the images in an lmdb folder, {key: key}, sorted."""
    from basicsr.data.data_util import paths_from_lmdb

    return {key: key for key in sorted(paths_from_lmdb(folder))}


def pair_images(lq: dict[str, str], gt: dict[str, str], filename_tmpl: str = '{}') -> list[dict[str, str]]:
    """Pairs gt `name` with lq `filename_tmpl.format(name)`: items {'lq_path', 'gt_path'} in gt's order.

    Args:
        lq, gt: {name: path}, as `list_images` gives them.

    Raises:
        ValueError: an image without its partner; gives the first three paths on each side.
    """
    partner = {filename_tmpl.format(name): name for name in gt}
    alone = {
        'lq': [gt[name] for expected, name in partner.items() if expected not in lq],
        'gt': [path for name, path in lq.items() if name not in partner],
    }
    if any(alone.values()):
        complaints = [
            f'no {role} image for {", ".join(paths[:3])}' + (f' and {len(paths) - 3} more' if len(paths) > 3 else '')
            for role, paths in alone.items()
            if paths
        ]
        raise ValueError(f'images do not pair (filename_tmpl {filename_tmpl!r}): {"; ".join(complaints)}')
    return [{'lq_path': lq[expected], 'gt_path': gt[name]} for expected, name in partner.items()]


def check_inside(folder: str, paths: Iterable[str]) -> None:
    """Raises ValueError, naming it, if a path from a list of images (meta-info) leads out of the folder of the images.

    By its name: links in the folder are the user's own, and may lead anywhere.
    """
    root = osp.join(osp.abspath(folder), '')
    for path in paths:
        if not osp.abspath(path).startswith(root):
            raise ValueError(f'{path} is outside of {folder}: names in a list of images have to lie in their folder')
