"""TIFF files: pixels by OpenCV, or by Pillow where OpenCV drops or multiplies alpha; tags by `ifd`, as OpenCV has none.

(tifffile keeps tags, but needs another package of 20 MB for LZW, JPEG and similar compression.)
"""

import io
import struct

import cv2
import numpy as np

from dpmambair_basicsr.files.full_range import scaled
from dpmambair_basicsr.files.ifd import Ifd, Tag, first, read_ifds, write_ifd

SAMPLES, BITS, PHOTOMETRIC, EXTRA_SAMPLES, STRIPS, PLANES = 277, 258, 262, 338, 273, 284
CMYK, WHITE_IS_ZERO = 5, 0
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha: colours multiplied by it, or not
LARGEST = 2**32
BEYOND = 'TIFF files cannot exceed 4 GiB'


def needs_pillow(ifd: Ifd) -> bool:
    """Whether OpenCV would change the colours.

    Raises:
        ValueError: Pillow cannot read them correctly either.
    """
    samples, bits, photometric = (first(ifd, number, 1) for number in (SAMPLES, BITS, PHOTOMETRIC))
    extra = first(ifd, EXTRA_SAMPLES, UNASSOCIATED)
    if photometric == CMYK or samples == 2:
        if bits != 8:
            raise ValueError(f'is {bits}-bit {"CMYK" if photometric == CMYK else "grey with alpha"}; expected 8-bit')
        return True
    if samples == 4 and extra not in (ASSOCIATED, UNASSOCIATED) or samples > 4:
        raise ValueError(f'has {samples} channels; only red, green, blue and alpha are supported')
    return multiplies_alpha(ifd)


def multiplies_alpha(ifd: Ifd) -> bool:
    """Whether OpenCV returns colours multiplied by alpha."""
    return first(ifd, SAMPLES, 1) == 4 and first(ifd, BITS, 1) == 8 and EXTRA_SAMPLES in ifd


def check_planes(ifd: Ifd) -> None:
    """Raise ValueError if OpenCV would mix up the channels."""
    if first(ifd, PLANES, 1) == 2 and first(ifd, SAMPLES, 1) > 1 and first(ifd, BITS, 1) > 8:
        raise ValueError('is a TIFF file of separate channels with more than 8 bits; expected interleaved channels')


def decode_page(content: np.ndarray, page: int, flags: int) -> np.ndarray | None:
    """OpenCV's pixels of a page, upright."""
    if page == 0:
        return cv2.imdecode(content, flags)
    read, pages = cv2.imdecodemulti(content, flags, range=(page, page + 1))
    return pages[0] if read else None


def straight(pixels: np.ndarray, ifd: Ifd) -> np.ndarray:
    """OpenCV's pixels, in the full range, with black as 0 and straight alpha.

    OpenCV returns 16-bit pixels as stored, and 10, 12 and 14 bits as the highest ones of 16.
    """
    if pixels.dtype != np.uint16:
        return pixels
    bits = first(ifd, BITS, 16)
    if bits in (10, 12, 14):
        pixels = scaled(pixels, 65536 - 2 ** (16 - bits))
    if first(ifd, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        return 65535 - pixels
    if pixels.ndim == 3 and pixels.shape[2] == 4 and first(ifd, EXTRA_SAMPLES, UNASSOCIATED) == ASSOCIATED:
        alpha = pixels[..., 3:].astype(np.float64)
        colours = (pixels[..., :3] * (65535 / np.maximum(alpha, 1))).round().clip(0, 65535)
        return np.dstack([colours.astype(np.uint16), pixels[..., 3:]])
    return pixels


def decode_by_pillow(content: bytes, page: int = 0) -> tuple[np.ndarray, bool]:
    """Pixels, BGR or BGRA, 8 bits, upright, and whether they are CMYK in the file.

    Raises:
        ValueError: the file is truncated.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.seek(page)
            cmyk = image.mode == 'CMYK'
            image = ImageOps.exif_transpose(image)
            pixels = np.asarray(image.convert('RGB' if cmyk else 'RGBA'))
    except (OSError, SyntaxError, struct.error, EOFError):
        raise ValueError('not a picture, or truncated') from None
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if cmyk else cv2.COLOR_RGBA2BGRA), cmyk


def encode(pages: list[tuple[np.ndarray, Ifd]]) -> bytes:
    """Encode pages, (H, W), (H, W, 3) BGR or (H, W, 4) BGRA, uint8 or uint16, as a lossless TIFF file with tags.

    OpenCV encodes each page; the pages are concatenated, each with its tags added to its list.

    Raises:
        ValueError, cv2.error: OpenCV cannot encode a page, or the file is too large.
    """
    content, link = bytearray(b'II*\0\0\0\0\0'), 4  # position of the offset of the next list
    for pixels, tags in pages:
        written, encoded = cv2.imencode('.tiff', pixels)
        if not written or len(content) + 2 * len(encoded) > LARGEST:
            raise ValueError(BEYOND if written else 'the encoder failed')
        (ifd,) = read_ifds(encoded.tobytes())
        strips = np.array(ifd[STRIPS].numbers()) + len(content)
        ifd = tags | ifd | {STRIPS: Tag(4, strips.astype('<u4').tobytes())}
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            ifd[EXTRA_SAMPLES] = Tag(3, struct.pack('<H', UNASSOCIATED))
        content += encoded.tobytes()
        content += bytes(len(content) % 2)
        struct.pack_into('<I', content, link, len(content))
        link = len(content) + 2 + 12 * len(ifd)
        content += write_ifd(ifd, len(content))
    return bytes(content)
