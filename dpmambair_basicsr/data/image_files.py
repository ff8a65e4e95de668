"""Image files for the datasets: listing, pairing and decoding, with errors that name the file. Images are (H, W, 3) RGB float32 in [0, 1]."""

import random
from pathlib import Path

import cv2
import numpy as np
import torch
from basicsr.data.transforms import augment
from basicsr.utils import FileClient

EXTENSIONS = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
_FULL_SCALE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


def list_images(folder: str) -> dict[str, str]:
    """Images directly in a folder, {stem: path}, sorted by stem. Hidden files and other extensions (Thumbs.db) are passed over.

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


def pair_images(lq_folder: str, gt_folder: str, filename_tmpl: str = '{}') -> list[dict[str, str]]:
    """Pairs gt `name` with lq `filename_tmpl.format(name)`, whatever their extensions; items {'lq_path', 'gt_path'} sorted by name.

    Raises:
        ValueError: an image without its partner; names the folders and the first of the images.
    """
    lq, gt = list_images(lq_folder), list_images(gt_folder)
    partner = {filename_tmpl.format(name): name for name in gt}
    without_lq = [gt[name] for expected, name in partner.items() if expected not in lq]
    without_gt = [path for name, path in lq.items() if name not in partner]
    complaints = [
        f'no {kind} for {", ".join(Path(path).name for path in paths[:3])}{f" and {len(paths) - 3} more" if len(paths) > 3 else ""}'
        for kind, paths in (('LQ', without_lq), ('GT', without_gt))
        if paths
    ]
    if complaints:
        raise ValueError(f'LQ folder {lq_folder} and GT folder {gt_folder} do not pair: {"; ".join(complaints)}')
    return [{'lq_path': lq[expected], 'gt_path': gt[name]} for expected, name in partner.items()]


class ImageReader:
    """Reads images from disk or lmdb through BasicSR's FileClient, which is made on first use: each worker process opens its own.

    Args:
        io_backend: BasicSR's option of that name, {'type': 'disk' | 'lmdb' | ..., ...}.
        lmdb_folders: {'lq': folder, 'gt': folder}, used by the lmdb backend only.
    """

    def __init__(self, io_backend: dict, lmdb_folders: dict[str, str]):
        self._backend = dict(io_backend)
        if self._backend['type'] == 'lmdb':
            self._backend.update(db_paths=list(lmdb_folders.values()), client_keys=list(lmdb_folders))
        self._client = None

    def read(self, path: str, role: str, index: int) -> np.ndarray:
        """The image at a path (or lmdb key). Grey becomes three equal channels, alpha is dropped, 16 bit keeps its precision.

        Args:
            role: 'lq' or 'gt'.
            index: of the item in the dataset, for the message.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not an image, or is cut short.
        """
        if self._client is None:
            options = dict(self._backend)
            self._client = FileClient(options.pop('type'), **options)
        try:
            content = self._client.get(path, role)
        except OSError as error:
            raise OSError(f'item {index}: cannot read {role} image {path}: {error.strerror}') from error
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH) if content else None
        if image is None or image.dtype not in _FULL_SCALE:
            raise ValueError(f'item {index}: {role} image {path} is missing, cut short or not an 8 or 16 bit image')
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32) / _FULL_SCALE[image.dtype]


def flip(images: list[np.ndarray], opt: dict) -> list[np.ndarray]:
    """The same random flips for all images: BasicSR's `use_hflip`, `use_rot` (vertical flip and transpose), and `use_vflip`."""
    images = augment(images, opt['use_hflip'], opt['use_rot'])
    images = images if isinstance(images, list) else [images]
    if opt['use_vflip'] and random.random() < 0.5:
        images = [image[::-1] for image in images]
    return [np.ascontiguousarray(image) for image in images]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) array to (3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
