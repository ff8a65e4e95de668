"""Metadata of picture files that OpenCV drops: resolution, text, captions, TIFF tags.

OpenCV itself keeps EXIF data, XMP and colour profile, except in TIFF. Metadata that does not apply to the pixels of the
result is corrected or left out: orientation, sizes, thumbnails.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dpmambair_basicsr.files.ifd import Ifd, Tag, first, read_ifds, write_ifd

PNG, JPEG, BMP, TIFF = b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff', b'BM', (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
PNG_START = 33  # bytes of signature and IHDR
PNG_COLOURS = (b'gAMA', b'cHRM', b'sRGB', b'mDCV', b'cLLI')
PNG_TEXTS = (b'tEXt', b'zTXt', b'iTXt', b'tIME')
OPENCVS_TEXTS = (b'XML:com.adobe.xmp', b'Raw profile type exif', b'Raw profile type APP1')  # read as XMP, as EXIF data
OPENCVS_SEGMENTS = (b'Exif\0', b'http://ns.adobe.com/xap/1.0/\0', b'ICC_PROFILE\0')
METRE = {1: 0.0254, 2: 0.01}  # units of JFIF
TIFF_METRE = {2: 0.0254, 3: 0.01}
MOST_PER_METRE = 2**31 - 1
JPEG_NAMES = {2: 'further pictures (MPF)', 11: 'content credentials'}
JFIF_DENSITY = 13  # offset in OpenCV's JPEG files
BMP_DENSITY = 38
# TIFF tags
ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, XMP_TAG, PROFILE_TAG = 274, 282, 283, 296, 700, 34675
PHOTOSHOP = 34377
# Pixel storage, thumbnails and layers: results have their own, or none.
TIFF_PIXELS = {254, 255, *range(256, 260), *range(262, 267), 273, 274, *range(277, 282), 284, *range(288, 294), 301}
TIFF_PIXELS |= {*range(317, 342), *range(342, 348), 437, *range(512, 522), *range(529, 533), 559, 37724, 50784}
# EXIF data outside its own lists: title, camera, software, date, author, copyright, Windows' texts.
EXIF_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 0x8769, 0x8825, *range(0x9C9B, 0x9CA0)}


@dataclass(frozen=True)
class Resolution:
    """Pixels per `unit` metres or, without a unit, the aspect ratio of pixels."""

    x: float
    y: float
    unit: float | None

    def per(self, unit: float) -> tuple[int, int]:
        factor = 1 if self.unit is None else unit / self.unit
        return round(self.x * factor), round(self.y * factor)


def resolution_of(x: float, y: float, unit: float | None) -> Resolution | None:
    """None if it is meaningless: zero, infinite, or more than PNG and BMP can state."""
    most = MOST_PER_METRE * (1 if unit is None else unit)
    return Resolution(x, y, unit) if 0 < x <= most and 0 < y <= most else None


@dataclass(frozen=True)
class Extras:
    """
    Attributes:
        chunks: PNG chunks, as in the file.
        segments: JPEG segments: comments, Photoshop's (IPTC captions).
        tags: TIFF tags, except those that describe pixels.
        left_out: names of metadata in the file that is not kept.
    """

    resolution: Resolution | None = None
    chunks: tuple[bytes, ...] = ()
    segments: tuple[bytes, ...] = ()
    tags: Ifd = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def read_extras(content: bytes) -> Extras:
    """Read the extras of PNG, JPEG and BMP files and of the first picture of TIFF files; none for other files."""
    if content.startswith(PNG):
        return png_extras(content)
    if content.startswith(JPEG):
        return jpeg_extras(content)
    if content.startswith(BMP) and len(content) >= BMP_DENSITY + 8:
        x, y = struct.unpack_from('<ii', content, BMP_DENSITY)
        profile = ('colour profile',) * (content[14] >= 124 and content[70:74] in (b'LINK', b'DEBM'))
        return Extras(resolution_of(x, y, 1), left_out=profile)
    if content.startswith(TIFF):
        return tiff_extras((read_ifds(content) or [{}])[0])
    return Extras()


def png_extras(content: bytes) -> Extras:
    resolution, kept = None, []
    for name, chunk in png_chunks(content):
        data = chunk[8:-4]
        if name == b'pHYs' and len(data) == 9:
            x, y, unit = struct.unpack('>IIB', data)
            resolution = resolution_of(x, y, 1 if unit == 1 else None)
        elif name in PNG_COLOURS or (name in PNG_TEXTS and data.partition(b'\0')[0] not in OPENCVS_TEXTS):
            kept.append(chunk)
    return Extras(resolution, chunks=tuple(kept))


def png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, whole chunk) pairs, up to the end of the file or the first damage."""
    place = len(PNG)
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], 'big')
        yield content[place + 4 : place + 8], content[place:end]
        place = end


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def jpeg_extras(content: bytes) -> Extras:
    resolution, kept, left_out = None, [], []
    for marker, segment in jpeg_segments(content):
        data, number = segment[4:], marker - 0xE0
        if marker == 0xE0 and data.startswith(b'JFIF\0') and len(data) >= 12:
            unit, x, y = struct.unpack_from('>BHH', data, 7)
            if (unit, x, y) != (0, 1, 1):
                resolution = resolution_of(x, y, METRE.get(unit))
        elif marker == 0xFE:
            kept.append(segment)
        elif data.startswith(b'Photoshop 3.0\0'):
            data = data[:14] + without_thumbnails(data[14:])
            kept.append(segment[:2] + struct.pack('>H', len(data) + 2) + data)
        elif 1 <= number <= 15 and number != 14 and not data.startswith(OPENCVS_SEGMENTS):
            known = number == 11 or data.startswith(b'MPF\0')
            left_out.append(JPEG_NAMES[number] if known else f'APP{number}')
    return Extras(resolution, segments=tuple(kept), left_out=tuple(dict.fromkeys(left_out)))


def jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, whole segment) pairs before the pixels, up to the first damage."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] not in (0xDA, 0xD9):
        if content[place + 1] == 0xFF:  # padding
            place += 1
            continue
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], 'big')
        yield content[place + 1], content[place:end]
        place = end


def tiff_extras(ifd: Ifd) -> Extras:
    tags = {number: tag for number, tag in ifd.items() if number not in TIFF_PIXELS}
    if PHOTOSHOP in tags:
        tags[PHOTOSHOP] = replace(tags[PHOTOSHOP], data=without_thumbnails(tags[PHOTOSHOP].data))
    left_out = ('layers',) if 37724 in ifd else ()
    return Extras(tiff_resolution(ifd), tags=tags, left_out=left_out)


def tiff_resolution(ifd: Ifd) -> Resolution | None:
    ratios = [(*ifd[number].numbers(), 1)[:2] if number in ifd else () for number in (X_RESOLUTION, Y_RESOLUTION)]
    x, y = (ratio[0] / ratio[1] if len(ratio) == 2 and ratio[1] else 0 for ratio in ratios)
    return resolution_of(x, y, TIFF_METRE.get(first(ifd, RESOLUTION_UNIT, 2)))


def exif_of_tags(tags: Ifd) -> bytes | None:
    """TIFF tags as EXIF data, for files of other formats; None if there are none."""
    tags = {number: tag for number, tag in tags.items() if number in EXIF_TAGS}
    return b'II*\0\x08\0\0\0' + write_ifd(tags, 8) if tags else None


def tags_of_exif(exif: bytes) -> Ifd:
    return {number: tag for number, tag in (read_ifds(exif) or [{}])[0].items() if number not in TIFF_PIXELS}


def resized_tags(tags: Ifd, height: int, width: int) -> Ifd:
    """Replace the picture's size in the EXIF list, if it is recorded there."""
    exif = tags.get(0x8769)
    if exif is None or exif.tags is None:
        return tags
    stated = {0xA002: width, 0xA003: height}
    sizes = {number: Tag(4, struct.pack('<I', size)) for number, size in stated.items() if number in exif.tags}
    return tags | {0x8769: replace(exif, tags=exif.tags | sizes)}


def without_thumbnails(resources: bytes) -> bytes:
    """Photoshop's image resources without thumbnails; damaged parts are left unchanged."""
    kept, place = b'', 0
    while resources[place : place + 4] == b'8BIM' and place + 12 <= len(resources):
        name = resources[place + 6] // 2 * 2 + 2
        length = int.from_bytes(resources[place + 6 + name : place + 10 + name], 'big')
        end = place + 10 + name + length + length % 2
        if int.from_bytes(resources[place + 4 : place + 6], 'big') not in (1033, 1036):
            kept += resources[place:end]
        place = end
    return kept + resources[place:]


def upright_xmp(xmp: bytes) -> bytes:
    """XMP for upright pixels, without thumbnails."""
    xmp = re.sub(rb'(tiff:Orientation(?:="|=\'|>)\s*)[2-8]', rb'\g<1>1', xmp)
    return re.sub(rb'<xmp:Thumbnails\b.*?</xmp:Thumbnails>', b'', xmp, flags=re.DOTALL)


def add_extras(content: bytes, extras: Extras) -> bytes:
    """Add to a PNG, JPEG or BMP file encoded by OpenCV the extras that its format supports; others are unchanged."""
    resolution = extras.resolution
    if content.startswith(PNG):
        chunks = b''.join(extras.chunks)
        if resolution is not None:
            x, y = resolution.per(1)
            chunks = png_chunk(b'pHYs', struct.pack('>IIB', x, y, resolution.unit is not None)) + chunks
        return content[:PNG_START] + chunks + content[PNG_START:]
    if content.startswith(JPEG):
        place = 2 + sum(len(segment) for marker, segment in jpeg_segments(content) if 0xE0 <= marker <= 0xEF)
        content = content[:place] + b''.join(extras.segments) + content[place:]
        if resolution is not None:
            unit = next((number for number, metre in METRE.items() if metre == resolution.unit), 1)
            density = [min(length, 65535) for length in resolution.per(METRE[unit])]
            unit = 0 if resolution.unit is None else unit
            content = content[:JFIF_DENSITY] + struct.pack('>BHH', unit, *density) + content[JFIF_DENSITY + 5 :]
        return content
    if content.startswith(BMP) and resolution is not None and resolution.unit is not None:
        return content[:BMP_DENSITY] + struct.pack('<ii', *resolution.per(1)) + content[BMP_DENSITY + 8 :]
    return content


def tiff_tags(extras: Extras, exif: bytes | None, xmp: bytes | None, profile: bytes | None) -> Ifd:
    """Tags for a picture's TIFF file: those of a TIFF source, or else its EXIF data, plus XMP and profile."""
    tags = extras.tags or tags_of_exif(exif or b'')
    if extras.resolution is not None and X_RESOLUTION not in tags:
        unit = next((number for number, metre in TIFF_METRE.items() if metre == extras.resolution.unit), 2)
        x, y = extras.resolution.per(TIFF_METRE[unit])
        numbers = struct.pack('<II', x, 1), struct.pack('<II', y, 1)
        tags |= {X_RESOLUTION: Tag(5, numbers[0]), Y_RESOLUTION: Tag(5, numbers[1])}
        tags[RESOLUTION_UNIT] = Tag(3, struct.pack('<H', 1 if extras.resolution.unit is None else unit))
    for number, kind, data in ((XMP_TAG, 1, xmp), (PROFILE_TAG, 7, profile)):
        tags = {key: tag for key, tag in tags.items() if key != number}
        if data is not None:
            tags[number] = Tag(kind, data)
    return tags
