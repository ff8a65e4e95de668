"""Decode and encode images, here only: headers are checked first, and files are written atomically."""

import io
import os
import struct
from pathlib import Path

import cv2
import numpy as np

from dpmambair_basicsr.files import avif, tiff
from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.containers import TIFF
from dpmambair_basicsr.files.full_range import full_range
from dpmambair_basicsr.files.ifd import Ifd, read_ifds

MAX_PIXELS = 2**28  # 1.7 GB while an 8-bit image is decoded; enough for 200-megapixel cameras
MAX_PIXELS_VARIABLE = 'DPMAMBAIR_MAX_PIXELS'
PNG = b'\x89PNG\r\n\x1a\n'
FORMATS = ('JPEG', 'BMP', 'TIFF', 'WEBP', 'PPM', 'GIF', 'JPEG2000', 'AVIF', 'SUN')  # read by OpenCV; PIL's names
# EXIF orientation -> how to rotate the pixels: (transpose first, then flip rows, then flip columns).
UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
SUN = b'\x59\xa6\x6a\x95'
TILE_SIZE = (322, 323)  # TIFF tags


def max_pixels() -> int:
    """Maximum number of pixels of an image: the option `max_pixels` or the environment variable, else MAX_PIXELS."""
    text = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f'{MAX_PIXELS_VARIABLE}: expected a positive int, got {text!r}')
    return int(text)


def check_size(content: bytes) -> tuple[int, int] | None:
    """`image_size`; raises ValueError, without the path, if it exceeds `max_pixels`. Nothing is decoded.

    124 kB of PNG can expand to 32000 x 32000 pixels, which take 6.5 GB.
    """
    size = image_size(content)
    if size is not None and size[0] * size[1] > max_pixels():
        raise ValueError(
            f'is {size[0]} x {size[1]} pixels, more than max_pixels, {max_pixels()}; to accept it, raise max_pixels '
            f'in the option file or {MAX_PIXELS_VARIABLE} in the environment'
        )
    return size


def image_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) that will be allocated, from the header alone; None if it is neither PNG nor one of FORMATS.

    For PNG, PIL would also read the chunks before the pixels, and reject some that the decoder accepts.
    """
    if content.startswith(PNG):
        return struct.unpack('>II', content[16:24]) if content[12:16] == b'IHDR' and len(content) >= 24 else None
    from PIL import Image

    Image.init()
    for name in FORMATS:
        read_header, accepts = Image.OPEN.get(name, (None, None))
        if read_header is not None and accepts is not None and accepts(content[:16]):
            try:
                header = read_header(io.BytesIO(content), '')
            except Exception:  # any: damaged headers fail in many ways
                continue
            width, height = (getattr(header, 'tag_v2', {}).get(tag, 0) for tag in TILE_SIZE)
            return max(header.size, (width, height), key=lambda size: size[0] * size[1])
    return None


def decode(
    content: bytes | None,
    flags: int = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH,
    decoder=cv2.imdecode,
    ifd: Ifd | None = None,
):
    """The image as decoded by OpenCV's `decoder`, in BGR; None if it is not an image, truncated, or empty.

    It is upright, except with cv2.IMREAD_UNCHANGED.

    Args:
        flags: IMREAD_COLOR, with or without IMREAD_ANYDEPTH, or IMREAD_UNCHANGED.
        ifd: of the page that is decoded, in a TIFF file; None: of the first.

    Raises:
        ValueError: see `check_size`, `full_range` and `tiff.check_planes`.
    """
    if not content or check_size(content) is None:
        return None
    if content.startswith(TIFF):
        ifd = ifd or (read_ifds(content, 1) or [{}])[0]
        tiff.check_planes(ifd)
        if flags != cv2.IMREAD_UNCHANGED and tiff.multiplies_alpha(ifd):
            return np.ascontiguousarray(tiff.decode_by_pillow(content)[0][..., :3])
    turned = avif.is_avif(content) and flags != cv2.IMREAD_UNCHANGED
    if turned:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION  # that of EXIF data
    try:
        pixels = decoder(np.frombuffer(with_palette(content), np.uint8), flags=flags)
    except cv2.error:  # more pixels than OPENCV_IO_MAX_IMAGE_PIXELS
        return None
    if pixels is None:
        return None
    pixels = full_range(pixels, content) if ifd is None else tiff.straight(pixels, ifd)
    return turn_upright(pixels, avif.orientation(content)) if turned else pixels


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transpose, rows, columns = UPRIGHT.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def with_palette(content: bytes) -> bytes:
    """A Sun raster of 1 or 8 bits with a palette of greys if it has none, for which OpenCV reads black; or any file."""
    if not content.startswith(SUN):
        return content
    (depth,), colours = struct.unpack_from('>I', content, 12), struct.unpack_from('>II', content, 24)
    palette = {1: b'\xff\0', 8: bytes(range(256))}.get(depth)
    if palette is None or colours != (0, 0):
        return content
    return content[:24] + struct.pack('>II', 1, 3 * len(palette)) + 3 * palette + content[32:]


def write_image(path: str | Path, image: np.ndarray, parameters: list[int] | None = None, durable: bool = True) -> None:
    """Write (H, W), (H, W, 3) BGR or (H, W, 4) BGRA in the format of the extension, atomically.

    Args:
        parameters: as for `cv2.imwrite`.
        durable: see `replacing`.

    Raises:
        OSError: naming the file, if it cannot be encoded or written.
    """
    path = Path(path)
    try:
        done, content = cv2.imencode(path.suffix, image, parameters or [])
    except cv2.error as error:
        raise OSError(f'{path} cannot be encoded: {error.err}') from error
    if not done:
        raise OSError(f'{path} cannot be encoded')
    write_bytes(path, content, durable)


def write_bytes(path: Path, content, durable: bool = True, shared: bool = False) -> None:
    """Write a file atomically. Raises OSError, naming it."""
    try:
        with replacing(path, durable, shared) as part:
            part.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, f'{error.strerror}, cannot be written', str(path)) from error
