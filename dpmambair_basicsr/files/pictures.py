"""Read and write picture files together with their metadata.

OpenCV 4.13 and newer reads and writes EXIF, XMP and the ICC profile with the pixels, and keeps 16 bits, for which
Pillow has no RGB mode. `containers` and `tiff` handle the rest; animations are read and written by Pillow.
"""

import io
import struct
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from dpmambair_basicsr.files import animations, avif, tiff
from dpmambair_basicsr.files.animations import Animation, Timing
from dpmambair_basicsr.files.codec import check_size, decode, max_pixels, turn_upright, write_bytes
from dpmambair_basicsr.files.containers import (
    PROFILE_TAG,
    TIFF,
    X_RESOLUTION,
    XMP_TAG,
    Extras,
    add_extras,
    exif_of_tags,
    png_chunks,
    read_extras,
    resized_tags,
    tiff_extras,
    tiff_tags,
    upright_xmp,
)
from dpmambair_basicsr.files.exif import Exif
from dpmambair_basicsr.files.ifd import Ifd, first, read_ifds
from dpmambair_basicsr.files.regular import open_regular

EXIF, XMP, PROFILE = cv2.IMAGE_METADATA_EXIF, cv2.IMAGE_METADATA_XMP, cv2.IMAGE_METADATA_ICCP
KINDS = {EXIF: 'EXIF data', XMP: 'XMP', PROFILE: 'colour profile'}
ALL = ('EXIF data', 'XMP', 'colour profile', 'resolution')


@dataclass(frozen=True)
class Format:
    """How files of an extension are written: JPEG at quality 98 without chroma subsampling, all others lossless.

    Attributes:
        encoder: OpenCV's, an extension.
        parameters: OpenCV's.
        alpha, deep: whether it supports alpha, 16 bits.
        holds: the metadata of `ALL` that it supports.
    """

    encoder: str
    parameters: tuple[int, ...] = ()
    alpha: bool = False
    deep: bool = False
    holds: tuple[str, ...] = ()


PNG = Format('.png', (), True, True, ALL)
JPEG = Format(
    '.jpg',
    (cv2.IMWRITE_JPEG_QUALITY, 98, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    holds=ALL,
)
TIF = Format('.tiff', (), True, True, ALL)
FORMATS = {
    '.png': PNG,
    '.apng': PNG,
    '.jpg': JPEG,
    '.jpeg': JPEG,
    '.jpe': JPEG,
    '.jfif': JPEG,
    '.tif': TIF,
    '.tiff': TIF,
    '.bmp': Format('.bmp', holds=('resolution',)),
    '.dib': Format('.bmp', holds=('resolution',)),
    '.webp': Format('.webp', (cv2.IMWRITE_WEBP_QUALITY, 101), True, holds=ALL[:3]),  # more than 100: lossless
    '.avif': Format('.avif', (cv2.IMWRITE_AVIF_QUALITY, 100), True, holds=ALL[:3]),
    '.jp2': Format('.jp2', (cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000), True, True),
    '.sr': Format('.sr'),
    '.ras': Format('.sr'),
    '.ppm': Format('.pnm', deep=True),
    '.pgm': Format('.pnm', deep=True),
    '.pnm': Format('.pnm', deep=True),
}
EXTENSIONS = (*FORMATS, '.gif', '.pbm')  # of files that can be read
# Format of a file by its first bytes, for files with a wrong extension.
SIGNATURES = {b'\x89PNG\r\n\x1a\n': '.png', b'\xff\xd8\xff': '.jpg', b'BM': '.bmp', **dict.fromkeys(TIFF, '.tif')}
REDUCED = 1  # bit of TIFF's NewSubfileType: a smaller version of another page


@dataclass(frozen=True)
class Picture:
    """An upright picture.

    Attributes:
        image: (H, W, 3) RGB, uint8 or uint16.
        grey: whether the file has one channel; the three of `image` are then equal.
        alpha: (H, W) of the same type, or None.
        metadata: OpenCV's (kind, bytes): EXIF, with orientation 1, XMP, ICC profile.
        extras: all other metadata.
    """

    image: np.ndarray
    grey: bool
    alpha: np.ndarray | None
    metadata: list[tuple[int, np.ndarray]]
    extras: Extras = field(default_factory=Extras)

    def data(self, kind: int) -> bytes | None:
        return next((data.tobytes() for own, data in self.metadata if own == kind), None)

    def visible_image(self) -> np.ndarray:
        """`image`, with fully transparent pixels replaced by the colours of the nearest visible ones.

        Otherwise a network spreads their colours across the edges of visible parts.
        """
        if self.alpha is None or self.alpha.all() or not self.alpha.any():
            return self.image
        hidden = (self.alpha == 0).astype(np.uint8)
        _, labels = cv2.distanceTransformWithLabels(hidden, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
        colours = np.zeros((labels.max() + 1, 3), self.image.dtype)
        colours[labels[hidden == 0]] = self.image[hidden == 0]
        return np.where(hidden[..., None] == 0, self.image, colours[labels])


def read_picture(path: Path) -> Picture:
    """Read the picture in a file of any format that OpenCV supports. CMYK becomes RGB, without its profile.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a picture, is truncated, has values other than 8 or 16 bit integers, too many pixels, see
            `check_size`, or several pictures; without the path.
    """
    pictures, _ = read_pictures(path)
    if len(pictures) > 1:
        raise ValueError(f'has {len(pictures)} frames or pages, not one')
    return pictures[0]


def read_pictures(path: Path) -> tuple[list[Picture], Timing | None]:
    """Read the pages of a file, or the frames of an animation and their timing. Raises as `read_picture`."""
    with open_regular(path) as stream:
        content = stream.read()
    size = check_size(content)
    if content.startswith(TIFF):
        return read_pages(content), None
    if content and size is None:
        raise ValueError('not a picture, or truncated')
    animation = animations.read_animation(content)
    if animation is None:
        return [read_one(content)], None
    return frames_of(animation, content), animation.timing


def read_one(content: bytes) -> Picture:
    metadata = {}

    def decoder(part: np.ndarray, flags: int) -> np.ndarray | None:
        pixels, kinds, data = cv2.imdecodeWithMetadata(part, flags=flags)
        metadata.update((kind, np.asarray(own).reshape(-1)) for kind, own in zip(kinds, data, strict=True))
        return pixels

    pixels = with_hidden_shade(check_pixels(decode(content, cv2.IMREAD_UNCHANGED, decoder), content), content)
    orientation = None
    if avif.is_avif(content):
        metadata |= by_pillow(content)
        orientation = avif.orientation(content)
    return upright(pixels, metadata, read_extras(content), orientation)


def by_pillow(content: bytes) -> dict[int, np.ndarray]:
    """XMP and profile of an AVIF file, from which OpenCV reads EXIF data only."""
    from PIL import Image

    with suppress(OSError, SyntaxError), Image.open(io.BytesIO(content)) as image:
        found = {XMP: image.info.get('xmp'), PROFILE: image.info.get('icc_profile')}
        return {kind: np.frombuffer(data, np.uint8) for kind, data in found.items() if data}
    return {}


def with_hidden_shade(pixels: np.ndarray, content: bytes) -> np.ndarray:
    """OpenCV's pixels, with the alpha that it drops: that of a grey PNG with a transparent shade."""
    chunks = png_chunks(content) if content[12:16] == b'IHDR' and pixels.ndim == 2 else ()
    shade = next((chunk[8:10] for name, chunk in chunks if name == b'tRNS'), None)
    if shade is None:
        return pixels
    white, top = 2 ** content[24] - 1, np.iinfo(pixels.dtype).max
    hidden = pixels == (int.from_bytes(shade, 'big') & white) * (top // white)
    return np.dstack([pixels, pixels, pixels, np.where(hidden, 0, top).astype(pixels.dtype)])


def check_pixels(pixels: np.ndarray | None, content: bytes) -> np.ndarray:
    if pixels is None:
        raise ValueError('not a picture, or truncated' if content else 'is empty')
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f'has {pixels.dtype} values; only 8 and 16 bit integers are supported')
    return pixels


def upright(
    pixels: np.ndarray, metadata: dict[int, np.ndarray], extras: Extras, orientation: int | None = None
) -> Picture:
    """A picture from OpenCV's pixels, rotated according to `orientation` or, if None, their EXIF data."""
    metadata = dict(metadata)
    exif = Exif(metadata[EXIF].tobytes().removeprefix(b'Exif\0\0') if EXIF in metadata else b'')
    stated = exif.upright()
    turned = turn_upright(pixels, stated if orientation is None else orientation)
    if EXIF in metadata:
        metadata[EXIF] = np.frombuffer(bytes(exif.data), np.uint8)
        if turned.shape != pixels.shape:
            metadata[EXIF] = resized_exif(metadata[EXIF], *turned.shape[:2])
    pixels = turned
    if XMP in metadata:
        metadata[XMP] = np.frombuffer(upright_xmp(metadata[XMP].tobytes()), np.uint8)
    grey = pixels.ndim == 2
    if PROFILE in metadata and metadata[PROFILE].tobytes()[16:20] != (b'GRAY' if grey else b'RGB '):
        del metadata[PROFILE]  # describes the original CMYK or grey palette
        extras = replace(extras, left_out=(*extras.left_out, 'colour profile of other channels'))
    alpha = np.ascontiguousarray(pixels[..., 3]) if not grey and pixels.shape[2] == 4 else None
    convert = cv2.COLOR_GRAY2RGB if grey else cv2.COLOR_BGRA2RGB if alpha is not None else cv2.COLOR_BGR2RGB
    return Picture(cv2.cvtColor(pixels, convert), grey, alpha, list(metadata.items()), extras)


def read_pages(content: bytes) -> list[Picture]:
    """Read the pages of a TIFF file, without their smaller versions."""
    ifds = read_ifds(content)
    numbers = [number for number, ifd in enumerate(ifds) if number == 0 or not first(ifd, 254, 0) & REDUCED]
    if not ifds:
        raise ValueError('not a picture, or truncated')
    pixels = sum(first(ifds[number], 256, 0) * first(ifds[number], 257, 0) for number in numbers)
    if len(numbers) > 1 and pixels > max_pixels():
        raise ValueError(f'has {len(numbers)} pages of {pixels} pixels, together more than max_pixels, {max_pixels()}')
    pictures = [read_page(content, number, ifds[number]) for number in numbers]
    if len(numbers) < len(ifds):
        extras = pictures[0].extras
        left_out = (*extras.left_out, 'smaller versions')
        pictures[0] = replace(pictures[0], extras=replace(extras, left_out=left_out))
    return pictures


def read_page(content: bytes, number: int, ifd: Ifd) -> Picture:
    cmyk = False
    if tiff.needs_pillow(ifd):
        pixels, cmyk = tiff.decode_by_pillow(content, number)
    else:
        pixels = decode(content, cv2.IMREAD_UNCHANGED, lambda part, flags: tiff.decode_page(part, number, flags), ifd)
        pixels = check_pixels(pixels, content)
    extras, exif = tiff_extras(ifd), exif_of_tags(tiff_extras(ifd).tags)
    found = {XMP: ifd.get(XMP_TAG), PROFILE: ifd.get(PROFILE_TAG)}
    metadata = {kind: np.frombuffer(tag.data, np.uint8) for kind, tag in found.items() if tag is not None}
    if exif is not None:
        metadata[EXIF] = np.frombuffer(exif, np.uint8)
    if cmyk:
        metadata.pop(PROFILE, None)
        extras = replace(extras, left_out=(*extras.left_out, 'CMYK and its colour profile'))
    return upright(pixels, metadata, extras)


def frames_of(animation: Animation, content: bytes) -> list[Picture]:
    found = {EXIF: animation.exif, XMP: animation.xmp, PROFILE: animation.profile}
    metadata = {kind: np.frombuffer(data, np.uint8) for kind, data in found.items() if data}
    convert = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    extras = read_extras(content)
    frames = [upright(cv2.cvtColor(frame, convert[frame.shape[2]]), metadata, extras) for frame in animation.frames]
    return [replace(frame, grey=True) for frame in frames] if animation.grey else frames


def write_picture(path: Path, picture: Picture, kind: str | None = None) -> list[str]:
    """Write a picture and its metadata in the format of the path's extension, atomically.

    Args:
        kind: extension of the format, if it differs from the path's.

    Returns:
        The metadata that the format does not support and that was left out.

    Raises:
        OSError: the file cannot be written.
        ValueError: the format does not support the picture's alpha, 16 bits or size; without the path.
    """
    return write_pictures(path, [picture], None, kind)


def write_pictures(path: Path, pictures: list[Picture], timing: Timing | None, kind: str | None = None) -> list[str]:
    """Write pages, or the frames of an animation; see `write_picture`."""
    extension = (kind or path.suffix).lower()
    check_format(path, pictures, timing, kind)
    form, first = FORMATS[extension], pictures[0]
    height, width = first.image.shape[:2]
    try:
        if timing is not None:
            content = animated(extension, pictures, timing)
        elif form is TIF:
            content = tiff.encode([(pixels_of(picture), tags_of(picture)) for picture in pictures])
        else:
            content = still(form, first)
    except (cv2.error, ValueError, OSError, struct.error) as error:
        reason = error.err if isinstance(error, cv2.error) else error
        raise ValueError(f'cannot be written as {extension}, {width} x {height}: {reason}') from None
    write_bytes(path, content, shared=True)
    return lost(form, first)


def still(form: Format, picture: Picture) -> bytes:
    if form.encoder == '.webp' and picture.alpha is not None:  # OpenCV sets the colours of transparent pixels to black
        return animated('.webp', [picture], Timing((0,), 0))
    kinds, data = [], []
    for kind, part in picture.metadata:
        if KINDS.get(kind) in form.holds:
            kinds.append(kind)
            data.append(part)
    written, content = cv2.imencodeWithMetadata(form.encoder, pixels_of(picture), kinds, data, [*form.parameters])
    if not written:
        raise ValueError('the encoder refuses it')
    return add_extras(content.tobytes(), picture.extras)


def animated(extension: str, pictures: list[Picture], timing: Timing) -> bytes:
    frames = [pixels_of(picture) for picture in pictures]
    convert = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}
    frames = [frame if frame.ndim == 2 else cv2.cvtColor(frame, convert[frame.shape[2]]) for frame in frames]
    metadata = [pictures[0].data(kind) for kind in (EXIF, XMP, PROFILE)]
    content = animations.encode_animation(extension, Animation(frames, pictures[0].grey, timing, *metadata))
    return add_extras(content, pictures[0].extras)


def pixels_of(picture: Picture) -> np.ndarray:
    """Pixels in OpenCV's layout: (H, W) grey, (H, W, 3) BGR or (H, W, 4) BGRA."""
    pixels = cv2.cvtColor(picture.image, cv2.COLOR_RGB2GRAY if picture.grey else cv2.COLOR_RGB2BGR)
    return pixels if picture.alpha is None else np.dstack([pixels, picture.alpha])


def tags_of(picture: Picture) -> Ifd:
    return tiff_tags(picture.extras, *(picture.data(kind) for kind in (EXIF, XMP, PROFILE)))


def lost(form: Format, picture: Picture) -> list[str]:
    """The metadata of a picture that a format does not support."""
    extras = picture.extras
    own = [KINDS[kind] for kind, _ in picture.metadata if kind in KINDS]
    if extras.resolution is not None and not states_resolution(picture.data(EXIF)):
        own.append('resolution')
    found = [name for name in own if name not in form.holds]
    found += ['text and colour chunks'] * bool(extras.chunks and form is not PNG)
    found += ['comments and captions'] * bool(extras.segments and form is not JPEG)
    return found + [*extras.left_out]


def states_resolution(exif: bytes | None) -> bool:
    return exif is not None and any(X_RESOLUTION in ifd for ifd in read_ifds(exif)[:1])


def check_format(path: Path, pictures: list[Picture], timing: Timing | None = None, kind: str | None = None) -> None:
    """Raise ValueError if the format of the path's extension does not support the pictures, whatever their size."""
    extension = (kind or path.suffix).lower()
    form = FORMATS.get(extension)
    if form is None:
        raise ValueError(f'{extension or "a file without extension"} cannot be written; use --ext png')
    if timing is not None:
        if extension not in animations.WRITERS:
            raise ValueError(f'{extension} does not support {len(pictures)} lossless frames; use --ext png')
    elif len(pictures) > 1 and form is not TIF:
        raise ValueError(f'{extension} does not support its {len(pictures)} pages; use --ext tif')
    if any(picture.alpha is not None for picture in pictures) and not form.alpha:
        raise ValueError(f'{extension} does not support its alpha channel; use --ext png')
    if any(picture.image.dtype == np.uint16 for picture in pictures) and not form.deep:
        raise ValueError(f'{extension} does not support its 16 bits; use --ext png')


def format_of(path: Path) -> str:
    """The extension of a file's format by its first bytes if they are known, otherwise that of its name."""
    with open_regular(path) as stream:
        start = stream.read(12)
    if start[:4] == b'RIFF' and start[8:] == b'WEBP':
        return '.webp'
    found = next((extension for signature, extension in SIGNATURES.items() if start.startswith(signature)), None)
    by_name = path.suffix.lower()
    return by_name if found is None or FORMATS.get(by_name) is FORMATS[found] else found


def restored_picture(picture: Picture, image: np.ndarray) -> Picture:
    """The picture with the pixels of `image`, (H', W', 3); alpha is enlarged to its size.

    At the same size, fully transparent pixels keep their colours.
    """
    alpha = picture.alpha
    if alpha is not None and alpha.shape != image.shape[:2]:
        alpha = cv2.resize(alpha, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    elif alpha is not None:
        image = np.where(alpha[..., None] == 0, picture.image, image)
    if image.shape == picture.image.shape:
        return replace(picture, image=image, alpha=alpha)
    size, metadata = image.shape[:2], dict(picture.metadata)
    if EXIF in metadata:
        metadata[EXIF] = resized_exif(metadata[EXIF], *size)
    extras = replace(picture.extras, tags=resized_tags(picture.extras.tags, *size))
    return replace(picture, image=image, alpha=alpha, metadata=[*metadata.items()], extras=extras)


def resized_exif(data: np.ndarray, height: int, width: int) -> np.ndarray:
    exif = Exif(data.tobytes())
    exif.resize(height, width)
    return np.frombuffer(bytes(exif.data), np.uint8)


def side_by_side(left: Picture, right: Picture) -> Picture:
    """Both pictures side by side, the left one enlarged to the right one's size."""
    enlarged = cv2.resize(left.image, right.image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    alpha = None if right.alpha is None else np.hstack([right.alpha, right.alpha])
    return replace(right, image=np.hstack([enlarged, right.image]), alpha=alpha)
