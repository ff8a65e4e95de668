"""Read, resize, tile and write the images of a download like the published preparation scripts."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpmambair_basicsr.files.codec import decode, write_image
from dpmambair_basicsr.files.regular import open_regular

TILE, STEP = 480, 240  # BasicSR's extract_subimages


SCALES, SHORT_SIDE = (0.75, 0.5, 1 / 3), 400  # Real-ESRGAN's generate_multiscale_DF2K


def read(path: Path) -> np.ndarray:
    """(h, w, 3) BGR, uint8 or uint16, decoded as our datasets do.

    Raises:
        OSError: cannot be read.
        ValueError: not an image, truncated, or too many pixels, see `check_size`.
    """
    with open_regular(path) as stream:
        image = decode(stream.read())
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise ValueError('cannot be decoded as an image')
    return image


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, image, durable=False)


def shrink(image: np.ndarray) -> np.ndarray:
    """Downscales by 4 like MATLAB's bicubic on 8 bits, after cropping sides to multiples of 4.

    Each axis weights 16 pixels, columns first, with rounding in between. BasicSR's imresize does not round and reflects
    the border, which is replicated here. This gives the published LQ images of Set5, Set14 and Urban100 bit for bit
    (tests/test_prepare_data.py).
    """
    from basicsr.utils.matlab_functions import cubic

    weights = (cubic(torch.arange(-7.5, 8) / 4) / 4).numpy()  # multiples of 1 / 4096, so that float32 is exact
    image = image[: image.shape[0] // 4 * 4, : image.shape[1] // 4 * 4]
    for _ in range(2):
        padded = np.pad(image, ((6, 6), (0, 0), (0, 0)), mode='edge').astype(np.float32)
        total = sum(weight * padded[start : start + len(image) : 4] for start, weight in enumerate(weights))
        image = np.floor(total.clip(0, 255) + 0.5).astype(np.uint8).swapaxes(0, 1)
    return image


def scaled(image: np.ndarray) -> dict[str, np.ndarray]:
    """{suffix of the name: image} at the original scale and Real-ESRGAN's others."""
    height, width = image.shape[:2]
    sizes = [(int(width * scale), int(height * scale)) for scale in SCALES]
    sizes.append(tuple(SHORT_SIDE * side // min(height, width) for side in (width, height)))
    picture = Image.fromarray(image)  # in BGR, which makes no difference to resizing
    return {'': image} | {
        f'T{n}': np.asarray(picture.resize(size, Image.Resampling.LANCZOS)) for n, size in enumerate(sizes)
    }


def tiles(image: np.ndarray, size: int, step: int) -> list[np.ndarray]:
    """Tiles with stride `step`, the last ones aligned to the border. A side shorter than a tile is kept whole."""
    tops, lefts = ([*range(0, side - size, step), max(side - size, 0)] for side in image.shape[:2])
    return [image[top : top + size, left : left + size] for top in tops for left in lefts]
