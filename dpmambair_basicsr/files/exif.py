"""In-place edits of EXIF data: maker notes are valid only at their original offsets."""

import struct
from collections.abc import Iterator

ORIENTATION, EXIF_LIST, THUMBNAIL, THUMBNAIL_LENGTH = 0x0112, 0x8769, 0x0201, 0x0202
WIDTHS, HEIGHTS = (0x0100, 0xA002), (0x0101, 0xA003)
SHORT, LONG = 3, 4


class Exif:
    """EXIF data; damaged data is treated as empty and left unchanged.

    Args:
        data: TIFF header and lists of tags.
    """

    def __init__(self, data: bytes):
        self.data = bytearray(data)
        self.order = {b'II': '<', b'MM': '>'}.get(data[:2])

    def upright(self) -> int:
        """Returns the orientation (1 if none) and resets it to 1. Removes the thumbnail, which shows other pixels."""
        orientation = 1
        for tag, value, place, kind in self.numbers(self.first()):
            if tag == ORIENTATION:
                orientation = value
                self.set(place, kind, 1)
        self.remove_thumbnail()
        return orientation

    def resize(self, height: int, width: int) -> None:
        """Updates the size of the picture, if it is recorded."""
        lists = [self.first(), *(value for tag, value, _, _ in self.numbers(self.first()) if tag == EXIF_LIST)]
        for tag, _, place, kind in (number for offset in lists for number in self.numbers(offset)):
            if tag in WIDTHS or tag in HEIGHTS:
                self.set(place, kind, width if tag in WIDTHS else height)

    def remove_thumbnail(self) -> None:
        try:
            end = self.first() + 2 + 12 * self.unpack('H', self.first())
            second = self.unpack('I', end)
        except struct.error:
            return
        found = {tag: value for tag, value, _, _ in self.numbers(second)} if second else {}
        start, length = found.get(THUMBNAIL, 0), found.get(THUMBNAIL_LENGTH, 0)
        if second:
            struct.pack_into(f'{self.order}I', self.data, end, 0)
        if 8 < start <= start + length <= len(self.data):
            self.data[start : start + length] = bytes(length)
            if start + length == len(self.data):
                del self.data[start:]

    def first(self) -> int:
        """Offset of the first list; 0: none."""
        try:
            return self.unpack('I', 4) if self.order else 0
        except struct.error:
            return 0

    def numbers(self, offset: int) -> Iterator[tuple[int, int, int, int]]:
        """(tag, value, offset of the value, type) of the single integers in the list at an offset."""
        try:
            for entry in range(offset + 2, offset + 2 + 12 * self.unpack('H', offset), 12) if offset else ():
                tag, kind, count = struct.unpack_from(f'{self.order}HHI', self.data, entry)
                if kind in (SHORT, LONG) and count == 1:
                    yield tag, self.unpack('H' if kind == SHORT else 'I', entry + 8), entry + 8, kind
        except struct.error:
            return

    def unpack(self, kind: str, place: int) -> int:
        return struct.unpack_from(f'{self.order}{kind}', self.data, place)[0]

    def set(self, place: int, kind: int, value: int) -> None:
        struct.pack_into(f'{self.order}{"H" if kind == SHORT and value < 65536 else "I"}', self.data, place, value)
