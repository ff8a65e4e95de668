"""Picture files, read and written again with everything that is not the network's business.

One library does it all: OpenCV 4.13 and newer hands out EXIF, XMP and the ICC profile with the pixels and takes them
back, and keeps 16 bit. (Pillow has no 16-bit RGB; both together would have to agree on orientation and alpha.)
What it cannot do: of TIFF, the profile is lost and alpha refused; of a file with several pictures, the first is read;
grey with alpha becomes RGBA.
"""

import glob
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from dpmambair_basicsr.files.codec import decode, write_bytes
from dpmambair_basicsr.files.image_folders import EXTENSIONS
from dpmambair_basicsr.files.regular import open_regular

JPEG = [cv2.IMWRITE_JPEG_QUALITY, 98, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
QUALITY = {'.jpg': JPEG, '.jpeg': JPEG, '.webp': [cv2.IMWRITE_WEBP_QUALITY, 101]}  # more than 100: lossless
HOLDS_ALPHA = ('.png', '.webp')  # of 8-bit TIFF, OpenCV multiplies alpha into the colours
HOLDS_16_BIT = ('.png', '.tif', '.tiff')
ORIENTATION = 0x0112  # EXIF tag
# Value of the tag -> how to turn the pixels upright: (transpose first, then flip rows, then flip columns).
UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class Picture:
    """An upright picture.

    Attributes:
        image: (H, W, 3) RGB, uint8 or uint16.
        grey: whether the file has one channel; the three of `image` are then equal.
        alpha: (H, W) of the same type, or None.
        metadata: (kind, bytes) as OpenCV has them: EXIF, whose orientation is 1, XMP, ICC profile.
    """

    image: np.ndarray
    grey: bool
    alpha: np.ndarray | None
    metadata: list[tuple[int, np.ndarray]]


def read_picture(path: Path) -> Picture:
    """A picture of any format that OpenCV reads. CMYK becomes RGB, without its profile.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a picture, is truncated, has other than 8 or 16 bit integers, or too many pixels, see
            `check_size`; without the path.
    """
    with open_regular(path) as stream:
        decoded = decode(stream.read(), cv2.IMREAD_UNCHANGED, cv2.imdecodeWithMetadata)
    pixels, kinds, data = decoded or (None, (), ())
    if pixels is None:
        raise ValueError('not a picture, or truncated')
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f'has {pixels.dtype} values; 8 or 16 bit integers can be restored')
    metadata = dict(zip(kinds, data, strict=True))
    exif = metadata.get(cv2.IMAGE_METADATA_EXIF)
    if exif is not None:
        orientation, metadata[cv2.IMAGE_METADATA_EXIF] = reset_orientation(exif)
        pixels = turn_upright(pixels, orientation)
    grey = pixels.ndim == 2
    profile = metadata.get(cv2.IMAGE_METADATA_ICCP)
    if profile is not None and profile.tobytes()[16:20] != (b'GRAY' if grey else b'RGB '):
        del metadata[cv2.IMAGE_METADATA_ICCP]  # describes the CMYK that was
    alpha = np.ascontiguousarray(pixels[..., 3]) if not grey and pixels.shape[2] == 4 else None
    convert = cv2.COLOR_GRAY2RGB if grey else cv2.COLOR_BGRA2RGB if alpha is not None else cv2.COLOR_BGR2RGB
    return Picture(cv2.cvtColor(pixels, convert), grey, alpha, list(metadata.items()))


def write_picture(path: Path, picture: Picture) -> None:
    """Writes all of it in the format of the path's extension: beside it, then renamed, so that no half file is left.

    JPEG has quality 98 without chroma subsampling, the others are lossless.

    Raises:
        OSError: the file cannot be written.
        ValueError: the format cannot hold the picture: alpha, 16 bit, or its number of pixels; without the path.
    """
    check_format(path, picture)
    extension = path.suffix.lower()
    pixels = cv2.cvtColor(picture.image, cv2.COLOR_RGB2GRAY if picture.grey else cv2.COLOR_RGB2BGR)
    if picture.alpha is not None:
        pixels = np.dstack([pixels, picture.alpha])
    kinds, data = [kind for kind, _ in picture.metadata], [data for _, data in picture.metadata]
    try:
        written, content = cv2.imencodeWithMetadata(extension, pixels, kinds, data, QUALITY.get(extension, []))
    except cv2.error as error:
        written, reason = False, error.err
    else:
        reason = 'the encoder refuses it'
    if not written:
        height, width = pixels.shape[:2]
        raise ValueError(
            f'cannot be written as {extension or "a file without extension"}, {width} x {height}: {reason}'
        )
    write_bytes(path, content, shared=True)


def check_format(path: Path, picture: Picture) -> None:
    """Raises ValueError if the format of the path's extension cannot hold the picture, whatever its size."""
    extension = path.suffix.lower()
    if not extension or not cv2.haveImageWriter(f'picture{extension}'):
        raise ValueError(f'{path.name}: not a format that OpenCV writes')
    if picture.alpha is not None and extension not in HOLDS_ALPHA:
        raise ValueError(f'{extension} cannot hold its alpha channel')
    if picture.image.dtype == np.uint16 and extension not in HOLDS_16_BIT:
        raise ValueError(f'{extension} cannot hold its 16 bit')


def restored_picture(picture: Picture, image: np.ndarray) -> Picture:
    """The picture with the pixels of `image`, (H', W', 3); alpha is enlarged to its size."""
    alpha = picture.alpha
    if alpha is not None and alpha.shape != image.shape[:2]:
        alpha = cv2.resize(alpha, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return replace(picture, image=image, alpha=alpha)


def side_by_side(left: Picture, right: Picture) -> Picture:
    """Both pictures in one, the left with its pixels enlarged to the right one's size."""
    enlarged = cv2.resize(left.image, right.image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    alpha = None if right.alpha is None else np.hstack([right.alpha, right.alpha])
    return replace(right, image=np.hstack([enlarged, right.image]), alpha=alpha)


def reset_orientation(exif: np.ndarray) -> tuple[int, np.ndarray]:
    """The orientation that EXIF data asks for, 1 if none, and the data with 1 in its place, otherwise unchanged.

    Damaged data has none.
    """
    data = bytearray(exif.tobytes())
    order = {b'II': '<', b'MM': '>'}.get(bytes(data[:2]))
    try:
        (first,) = struct.unpack_from(f'{order}I', data, 4)
        (entries,) = struct.unpack_from(f'{order}H', data, first)
        for entry in range(first + 2, first + 2 + 12 * entries, 12):
            tag, kind, number, value = struct.unpack_from(f'{order}HHIH', data, entry)
            if (tag, kind, number) == (ORIENTATION, 3, 1):
                struct.pack_into(f'{order}H', data, entry + 8, 1)
                return value, np.frombuffer(data, np.uint8)
    except struct.error:
        pass
    return 1, exif


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transpose, rows, columns = UPRIGHT.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def list_pictures(argument: str) -> list[Path]:
    """The file, the pictures directly in the folder (by extension, hidden files left out), or the matches."""
    path = Path(argument)
    if path.is_dir():
        found = (part for part in path.iterdir() if part.suffix.lower() in EXTENSIONS and part.name[0] != '.')
        return sorted(part for part in found if part.is_file())
    if path.exists():
        return [path]
    return [part for match in sorted(glob.glob(argument, recursive=True)) for part in list_pictures(match)]
