"""Folders of image files: listing and pairing them by name, with errors that name the file. Nothing is opened."""

import logging
from collections import Counter
from collections.abc import Iterable
from os import path as osp
from pathlib import Path

EXTENSIONS = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


def list_images(folder: str) -> dict[str, str]:
    """Images directly in a folder, {stem: path}, sorted by stem. Other files (Thumbs.db) are counted in the log.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it, two with the same stem, something other than a file, or broken links.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'image folder {folder} does not exist')
    images, others, dead = {}, Counter(), []
    for path in sorted(Path(folder).iterdir(), key=lambda path: (path.stem, path.suffix)):
        if path.name.startswith('.'):
            others['hidden'] += 1
        elif path.is_dir():
            others['folders'] += 1
        elif path.suffix.lower() not in EXTENSIONS:
            others[path.suffix or 'without extension'] += 1
        elif not path.exists():
            dead.append(path.name)
        elif not path.is_file():
            raise ValueError(f'{path}: not a regular file')
        elif path.stem in images:
            raise ValueError(
                f'{folder} has two images of the same name: {Path(images[path.stem]).name} and {path.name}'
            )
        else:
            images[path.stem] = str(path)
    if dead:
        raise ValueError(f'{folder}: {some(dead)} cannot be read: broken link')
    if not images:
        raise ValueError(f'no image in folder {folder} (looked for {" ".join(EXTENSIONS)})')
    if others:
        counts = ', '.join(f'{count} {kind}' for kind, count in sorted(others.items()))
        # Not get_root_logger, which would open BasicSR's log without its file if it is not open yet.
        logging.getLogger('basicsr').info(f'{folder}: {len(images)} images; skipped: {counts}.')
    return images


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
        complaints = [f'no {role} image for {some(paths)}' for role, paths in alone.items() if paths]
        raise ValueError(f'images do not pair (filename_tmpl {filename_tmpl!r}): {"; ".join(complaints)}')
    return [{'lq_path': lq[expected], 'gt_path': gt[name]} for expected, name in partner.items()]


def some(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def check_inside(folder: str, paths: Iterable[str]) -> None:
    """Raises ValueError, naming it, if a path from a list of images (meta-info) leads out of the folder of the images.

    Only names are checked: links in the folder are the user's own and may point anywhere.
    """
    root = osp.join(osp.abspath(folder), '')
    for path in paths:
        if not osp.abspath(path).startswith(root):
            raise ValueError(f'{path} is outside of {folder}: names in a list of images must stay inside the folder')
