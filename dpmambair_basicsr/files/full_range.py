"""OpenCV returns the values of unusual depths as stored, or shifted: white would be grey or nearly black."""

import re

import numpy as np

from dpmambair_basicsr.files import avif

BMP, GREEN = b'BM', b'\xe0\x07'  # the mask of 6 bits
PNM = re.compile(rb'P([2356])' + 3 * rb'(?:\s|#[^\n\r]*[\n\r])+(\d+)')  # kind, width, height, highest value
JPEG2000, CODESTREAM = b'\0\0\0\x0cjP  ', b'\xff\x4f\xff\x51'
CHANNELS = 42  # offset of their depths in CODESTREAM; the number of channels is before


def full_range(pixels: np.ndarray, content: bytes) -> np.ndarray:
    """OpenCV's pixels of a file, with white as 255 or 65535; not for TIFF.

    Raises:
        ValueError: white is unknown.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        return pixels
    if content.startswith(BMP) and content[14] == 40 and content[28] == 16:  # 5 bits, or 5, 6 and 5
        six = content[30] == 3 and content[58:60] == GREEN
        return np.dstack([scaled(pixels[..., at], 252 if six and at == 1 else 248) for at in range(3)])
    return scaled(pixels, white(pixels, content))


def scaled(pixels: np.ndarray, white: int) -> np.ndarray:
    """uint8 or uint16 in [0, white] scaled to the whole range of their type."""
    top = np.iinfo(pixels.dtype).max
    if white == top:
        return pixels
    values = np.arange(top + 1, dtype=np.int64).clip(max=white)
    return ((values * top + white // 2) // white).astype(pixels.dtype)[pixels]


def white(pixels: np.ndarray, content: bytes) -> int:
    top = int(np.iinfo(pixels.dtype).max)
    if header := PNM.match(content):
        kind, _, _, stated = map(int, header.groups())
        return top if kind < 5 and stated < 256 else min(stated, top)  # OpenCV scales bytes that are text
    if top > 255 and avif.is_avif(content):
        depth = avif.depth(content)
        if not depth:
            raise ValueError('has an unknown number of bits')
        return 2**depth - 1
    if top > 255 and content.startswith((JPEG2000, CODESTREAM)):
        start = content.find(CODESTREAM) + CHANNELS
        end = start + 3 * int.from_bytes(content[start - 2 : start], 'big')
        depths = {(stated & 127) + 1 for stated in content[start:end:3]}
        if len(depths) > 1:
            raise ValueError('has channels of different bits')
        return 2 ** depths.pop() - 1
    return top
