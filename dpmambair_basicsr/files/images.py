"""Image decoding for the datasets, with errors that name the file.

Images are (H, W, 3) RGB in their stored type, uint8 or uint16. Call `to_float` after cropping: on a whole 1280x720
image it takes 17 ms, nearly as long as decoding.
"""

import random
from functools import cache
from os import path as osp

import cv2
import numpy as np
import torch

from dpmambair_basicsr.files.codec import decode
from dpmambair_basicsr.files.regular import check_regular

_FULL_SCALE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


@cache
def _open(backend: str, folder: str, **options):
    """One client per folder and process: lmdb 3 refuses to open a folder twice, and two datasets may share their GT."""
    from basicsr.utils import FileClient

    if backend == 'lmdb':
        options['db_paths'] = folder
    return FileClient(backend, **options)


class ImageReader:
    """Reads images through BasicSR's FileClient, opened on first use: the reader can be sent to a spawned worker.

    Args:
        io_backend: BasicSR's option of that name, {'type': 'disk' | 'lmdb' | 'memcached', ...}.
        folders: {'lq': folder, 'gt': folder}; only the lmdb backend needs them.
    """

    def __init__(self, io_backend: dict, folders: dict[str, str]):
        self._options = dict(io_backend)
        self._backend = self._options.pop('type')
        self._folders = folders

    def read(self, path: str, role: str, index: int) -> np.ndarray:
        """The image at a path (or lmdb key). Grey becomes three channels, alpha is dropped, 16 bit is kept.

        Args:
            role: 'lq' or 'gt'.
            index: of the item in the dataset, for the message.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not an image, is truncated, not a regular file, or has too many pixels, see `check_size`.
        """
        try:
            if self._backend == 'disk':
                check_regular(path)
            content = _open(self._backend, osp.realpath(self._folders[role]), **self._options).get(path)
        except OSError as error:
            raise OSError(f'item {index}: cannot read {role} image {path}: {error.strerror}') from error
        except ValueError as error:
            raise ValueError(f'item {index}: {role} image {error}') from None
        try:
            image = decode(content)
        except ValueError as error:
            raise ValueError(f'item {index}: {role} image {path} {error}') from None
        if image is None or image.dtype not in _FULL_SCALE:
            raise ValueError(f'item {index}: {role} image {path} is missing, truncated or not an 8 or 16 bit image')
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def fit_crop(image: np.ndarray, size: int, pad: bool, path: str, index: int) -> np.ndarray:
    """The image, mirrored at the bottom and on the right up to `size` if it is smaller and may be padded.

    Raises:
        ValueError: smaller and `pad` is false.
    """
    height, width = image.shape[:2]
    below, right = max(size - height, 0), max(size - width, 0)
    if not (below or right):
        return image
    if not pad:
        raise ValueError(
            f'item {index}: {path} is {width}x{height}, smaller than the crop of {size}; set pad_small: true to pad it'
        )
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT)


def flip(images: list[np.ndarray], opt: dict) -> list[np.ndarray]:
    """The same random flips for all images: `use_hflip`, `use_rot` (vertical, transposed) of BasicSR, `use_vflip`."""
    from basicsr.data.transforms import augment

    images = augment(images, opt['use_hflip'], opt['use_rot'])
    images = images if isinstance(images, list) else [images]
    if opt['use_vflip'] and random.random() < 0.5:
        images = [image[::-1] for image in images]
    return [np.ascontiguousarray(image) for image in images]


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 or uint16 to float32 in [0, 1]."""
    return image.astype(np.float32) / _FULL_SCALE[image.dtype]


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) float array to (3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
