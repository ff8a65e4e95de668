"""Read and write animations with Pillow: OpenCV keeps neither their profile nor their EXIF data."""

import io
import struct
from dataclasses import dataclass

import cv2
import numpy as np

from dpmambair_basicsr.files.codec import max_pixels
from dpmambair_basicsr.files.containers import PNG, png_chunk, png_chunks

WRITERS = {'.png': 'PNG', '.apng': 'PNG', '.webp': 'WEBP'}  # lossless
OPTIONS = {'PNG': {}, 'WEBP': {'lossless': True, 'exact': True}}
GREY = ('1', 'L', 'LA')


@dataclass(frozen=True)
class Timing:
    """
    Attributes:
        durations: of the frames, in milliseconds.
        loop: number of repetitions; 0: forever.
        default_image: whether the first frame is shown only by programs without support for animations.
    """

    durations: tuple[float, ...]
    loop: int
    default_image: bool = False


@dataclass(frozen=True)
class Animation:
    """
    Attributes:
        frames: (H, W, 3) RGB or (H, W, 4) RGBA, uint8, full frames.
        grey: whether all are grey, without alpha, in the file.
        exif, xmp, profile: as stored in the file.
    """

    frames: list[np.ndarray]
    grey: bool
    timing: Timing
    exif: bytes | None
    xmp: bytes | None
    profile: bytes | None


def read_animation(content: bytes) -> Animation | None:
    """The animation in a file; None if it is not PNG, GIF, WebP or AVIF, or has only one frame.

    Raises:
        ValueError: it is truncated, has 16 bits, or its frames together have too many pixels, see `codec.max_pixels`.
    """
    if not may_be_animated(content):
        return None
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            count = getattr(image, 'n_frames', 1)
            if count == 1:
                return None
            check(content, count, *image.size)
            frames, durations = by_opencv(content) if (image.format, image.mode) == ('GIF', 'L') else by_pillow(image)
            if len(frames) != count:
                raise EOFError
            grey = image.mode in GREY and all(is_grey(frame) for frame in frames)
            loop = image.info.get('loop', 0 if image.format != 'GIF' else 1)
            timing = Timing(tuple(durations), loop, bool(image.info.get('default_image')))
            exif, xmp, profile = (image.info.get(name) for name in ('exif', 'xmp', 'icc_profile'))
    except (OSError, SyntaxError, EOFError, struct.error, cv2.error):
        raise ValueError('is a truncated or damaged animation') from None
    return Animation(frames, grey, timing, exif, xmp, profile)


def by_pillow(image) -> tuple[list[np.ndarray], list[float]]:
    """Frames and durations."""
    mode = 'RGBA' if image.has_transparency_data else 'RGB'
    frames, durations = [], []
    for index in range(image.n_frames):
        image.seek(index)
        image.load()
        frames.append(np.asarray(image.convert(mode)))
        durations.append(float(image.info.get('duration') or 0))
    return frames, durations


def by_opencv(content: bytes) -> tuple[list[np.ndarray], list[float]]:
    """Frames and durations of a GIF whose first palette is grey, where Pillow ignores transparency and the others."""
    _, animation = cv2.imdecodeanimation(np.frombuffer(content, np.uint8))
    convert = {3: cv2.COLOR_BGR2RGBA, 4: cv2.COLOR_BGRA2RGBA}
    frames = [cv2.cvtColor(frame, convert[frame.shape[2]]) for frame in animation.frames]
    if all((frame[..., 3] == 255).all() for frame in frames):
        frames = [np.ascontiguousarray(frame[..., :3]) for frame in frames]
    return frames, [float(duration) for duration in animation.durations]


def is_grey(frame: np.ndarray) -> bool:
    return frame.shape[2] == 3 and bool((frame == frame[..., :1]).all())


def may_be_animated(content: bytes) -> bool:
    if content.startswith(PNG):
        return any(name == b'acTL' for name, _ in png_chunks(content))
    return content.startswith(b'GIF8') or content[8:12] == b'WEBP' or content[4:12] == b'ftypavis'


def check(content: bytes, count: int, width: int, height: int) -> None:
    if count * width * height > max_pixels():
        raise ValueError(f'has {count} frames of {width} x {height} pixels, together more than max_pixels')
    if content.startswith(PNG) and content[24] == 16:
        raise ValueError('is a 16-bit animation; only 8 bits are supported')


def encode_animation(extension: str, animation: Animation) -> bytes:
    """The encoded file, with lossless frames.

    Raises:
        ValueError: the format does not support lossless animations.
    """
    from PIL import Image

    kind = WRITERS.get(extension)
    if kind is None:
        raise ValueError(f'{extension} does not support lossless animations; use --ext png or --ext webp')
    first, *rest = (Image.fromarray(frame) for frame in animation.frames)
    timing, stream = animation.timing, io.BytesIO()
    options = OPTIONS[kind] | {'duration': list(timing.durations), 'loop': timing.loop}
    if timing.default_image:
        options['duration'] = list(timing.durations[1:])
        if kind == 'PNG':
            options['default_image'] = True
        else:
            first, *rest = rest
    kept = {'exif': animation.exif, 'icc_profile': animation.profile, 'xmp': animation.xmp if kind == 'WEBP' else None}
    options |= {name: value for name, value in kept.items() if value is not None}
    first.save(stream, kind, save_all=True, append_images=rest, **options)
    content = stream.getvalue()
    if kind == 'PNG' and animation.xmp is not None:
        chunk = png_chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + animation.xmp)
        content = content[:33] + chunk + content[33:]
    return content
