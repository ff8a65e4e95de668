"""Read and write the tag lists (IFDs) of TIFF files and EXIF data, keeping each tag's type and bytes.

Pillow would guess types and replace non-ASCII characters by question marks. Private tags are copied unchanged: offsets
inside them, as in some maker notes, may become invalid.
"""

import struct
from dataclasses import dataclass

import numpy as np

# Type of a tag -> NumPy's type of its numbers; for rationals, of numerator and denominator.
NUMBERS = {1: 'u1', 2: 'u1', 3: 'u2', 4: 'u4', 5: 'u4', 6: 'i1', 7: 'u1', 8: 'i2', 9: 'i4', 10: 'i4', 11: 'f4'}
NUMBERS |= {12: 'f8', 13: 'u4', 16: 'u8', 17: 'i8', 18: 'u8'}
RATIONALS = (5, 10)
SUB_IFDS = (0x8769, 0x8825, 0xA005)  # EXIF, GPS, interoperability
MOST_LISTS = 1000  # limit on pages


@dataclass(frozen=True)
class Tag:
    """A value: its TIFF type, its bytes, little-endian, and, for SUB_IFDS, the tags that it points to."""

    kind: int
    data: bytes
    tags: 'dict[int, Tag] | None' = None

    def numbers(self) -> list:
        """The value as numbers; numerators and denominators of rationals alternate."""
        return np.frombuffer(self.data, f'<{NUMBERS[self.kind]}').tolist()


Ifd = dict[int, Tag]


def first(ifd: Ifd, number: int, default: int) -> int:
    """The first number of a tag; the default without any."""
    return ifd[number].numbers()[0] if number in ifd and ifd[number].data else default


def value_size(kind: int) -> int:
    return np.dtype(NUMBERS[kind]).itemsize * (2 if kind in RATIONALS else 1)


def read_ifds(content: bytes, most: int = MOST_LISTS) -> list[Ifd]:
    """The chain of lists in a TIFF or BigTIFF file, or in EXIF data. Damaged parts are skipped."""
    order = {b'II': '<', b'MM': '>'}.get(content[:2])
    if order is None:
        return []
    reader, ifds, seen = _Reader(content, order), [], set()
    try:
        offset = reader.unpack(reader.offset, 8 if reader.big else 4)[0]
        while offset and offset not in seen and len(ifds) < most:
            seen.add(offset)
            ifd, offset = reader.ifd(offset)
            ifds.append(ifd)
    except (struct.error, OverflowError):
        pass
    return ifds


class _Reader:
    def __init__(self, content: bytes, order: str):
        self.content, self.order = content, order
        self.big = content[2:4] in (b'+\0', b'\0+')
        self.count, self.offset = ('Q', 'Q') if self.big else ('H', 'I')
        self.left = len(content)  # budget for bytes of values, since many tags may point to the same ones

    def unpack(self, kinds: str, offset: int) -> tuple:
        return struct.unpack_from(self.order + kinds, self.content, offset)

    def ifd(self, offset: int, depth: int = 0) -> tuple[Ifd, int]:
        """The list at an offset, and the offset of the next. Raises struct.error beyond the end."""
        (entries,) = self.unpack(self.count, offset)
        first, inline = offset + struct.calcsize(f'={self.count}'), struct.calcsize(f'={self.offset}')
        end = first + (4 + 2 * inline) * entries
        (following,) = self.unpack(self.offset, end)
        ifd = {}
        for entry in range(first, end, 4 + 2 * inline):
            number, kind, values = self.unpack(f'HH{self.offset}', entry)
            if kind not in NUMBERS:
                continue
            length, place = values * value_size(kind), entry + 4 + inline
            if length > inline:
                (place,) = self.unpack(self.offset, place)
            self.left -= length
            if place + length > len(self.content) or self.left < 0:
                continue
            ifd[number] = self.tag(number, kind, self.content[place : place + length], depth)
        return ifd, following

    def tag(self, number: int, kind: int, data: bytes, depth: int) -> Tag:
        numbers = np.frombuffer(data, f'{self.order}{NUMBERS[kind]}')
        tags = None
        if number in SUB_IFDS and len(numbers) == 1 and depth < 2:
            try:
                tags, _ = self.ifd(int(numbers[0]), depth + 1)
            except (struct.error, OverflowError):
                tags = {}
        return Tag(kind, numbers.astype(f'<{NUMBERS[kind]}').tobytes(), tags)


def write_ifd(ifd: Ifd, offset: int, following: int = 0) -> bytes:
    """The list, encoded for an even offset of a little-endian TIFF file and followed by all data its tags point to.

    Args:
        following: offset of the next list; 0 for the last.

    Raises:
        struct.error: beyond 4 GiB, which TIFF cannot hold.
    """
    behind = offset + 2 + 12 * len(ifd) + 4
    entries, values = struct.pack('<H', len(ifd)), b''
    for number, tag in sorted(ifd.items()):
        kind, data = tag.kind, tag.data
        if tag.tags is not None:
            kind, data = 4, struct.pack('<I', behind + len(values))
            values += write_ifd(tag.tags, behind + len(values))
        count = len(data) // value_size(kind)
        if len(data) > 4:
            data, values = struct.pack('<I', behind + len(values)), values + data + bytes(len(data) % 2)
        entries += struct.pack('<HHI4s', number, kind, count, data)
    return entries + struct.pack('<I', following) + values
