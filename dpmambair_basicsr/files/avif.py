"""Depth and orientation of AVIF files: OpenCV tells neither, and Pillow only the orientation.

The boxes are those of ISO/IEC 14496-12 and 23008-12 (HEIF). EXIF data has no say in the orientation there.
"""

import struct
from collections.abc import Iterator

# (quarter turns anticlockwise, axis of the mirror that follows or -1) -> orientation, as in EXIF data.
ORIENTATIONS = {(0, 0): 4, (0, 1): 2, (1, 0): 5, (1, 1): 7, (2, 0): 2, (2, 1): 4, (3, 0): 7, (3, 1): 5}
ORIENTATIONS |= {(0, -1): 1, (1, -1): 8, (2, -1): 3, (3, -1): 6}


def is_avif(content: bytes) -> bool:
    """Whether a file that OpenCV can decode is AVIF: their main brand may be that of HEIF."""
    return content[4:8] == b'ftyp'


def depth(content: bytes) -> int | None:
    """Bits per channel; None if not stated."""
    own, of_all = properties(content)
    if b'av1C' not in own and len(own.get(b'pixi', b'')) > 5:  # a picture in tiles
        return own[b'pixi'][5]
    config = own.get(b'av1C') or of_all.get(b'av1C', b'')
    return None if len(config) < 3 else 8 if not config[2] & 0x40 else 12 if config[2] & 0x20 else 10


def orientation(content: bytes) -> int:
    """How the decoded pixels are to be turned, as in EXIF data."""
    own, _ = properties(content)
    turns, mirror = own.get(b'irot'), own.get(b'imir')
    return ORIENTATIONS[turns[0] & 3 if turns else 0, mirror[0] & 1 if mirror else -1]


def properties(content: bytes) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """{name: data} of the main picture's properties, and of all. Empty if damaged."""
    try:
        meta = dict(boxes(dict(boxes(content))[b'meta'][4:]))
        (main,) = struct.unpack_from('>I' if meta[b'pitm'][0] else '>H', meta[b'pitm'], 4)
        lists = [*boxes(meta[b'iprp'])]
        found = [*boxes(dict(lists)[b'ipco'])]
        numbers = [number for name, data in lists if name == b'ipma' for number in numbers_of(data, main)]
        return dict(found[number - 1] for number in numbers if 0 < number <= len(found)), dict(found)
    except (KeyError, IndexError, struct.error):
        return {}, {}


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, data) pairs, up to the end or the first damage."""
    place = 0
    while place + 8 <= len(content):
        size, name = struct.unpack_from('>I4s', content, place)
        header = 8
        if size == 1:
            (size,), header = struct.unpack_from('>Q', content, place + 8), 16
        end = place + size if size else len(content)
        if not place + header <= end <= len(content):
            return
        yield name, content[place + header : end]
        place = end


def numbers_of(associations: bytes, item: int) -> Iterator[int]:
    """The numbers, from 1, of an item's properties."""
    wide_items, wide_numbers = associations[0] > 0, associations[3] & 1
    (items,), place = struct.unpack_from('>I', associations, 4), 8
    for _ in range(items):
        own, count = struct.unpack_from('>IB' if wide_items else '>HB', associations, place)
        place += 5 if wide_items else 3
        for _ in range(count):
            (number,) = struct.unpack_from('>H' if wide_numbers else '>B', associations, place)
            place += 2 if wide_numbers else 1
            if own == item:
                yield number & (0x7FFF if wide_numbers else 0x7F)
