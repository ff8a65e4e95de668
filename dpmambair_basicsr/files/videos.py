"""Read and write video files frame by frame: frames keep their timestamps, all other streams are copied.

Needs PyAV, which includes FFmpeg's libraries. It is given open files and the name of their demuxer, so that it opens
nothing else, whatever a file refers to.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.codec import max_pixels
from dpmambair_basicsr.files.errors import MissingLibraryError
from dpmambair_basicsr.files.regular import open_regular


@dataclass(frozen=True)
class Container:
    """
    Attributes:
        demuxer, muxer: FFmpeg's names.
        encoder, options: for the frames, nearly lossless.
    """

    demuxer: str
    muxer: str
    encoder: str = 'libx264'
    options: dict[str, str] = field(default_factory=lambda: {'crf': '14', 'preset': 'medium'})


VIDEOS = {
    '.mp4': Container('mov', 'mp4'),
    '.m4v': Container('mov', 'mp4'),
    '.mov': Container('mov', 'mov'),
    '.mkv': Container('matroska', 'matroska'),
    '.webm': Container('matroska', 'webm', 'libvpx-vp9', {'crf': '16', 'b': '0', 'row-mt': '1'}),
}
ONLY_IN = {'cover': 'mp4', 'thumbnails': '', 'attachment': 'matroska'}  # muxers; others fail, or write something else
HDR = {16: 'PQ', 18: 'HLG'}  # transfer characteristics, ITU-T H.273


@dataclass
class Frame:
    """
    Attributes:
        image: (H, W, 3) RGB, upright; uint16 if the video has more than 8 bits.
        source: PyAV's frame.
    """

    image: np.ndarray
    source: Any


def import_av() -> Any:
    try:
        import av
        import av.container
        import av.error

        if not hasattr(av.container.OutputContainer, 'set_chapters'):
            raise ImportError(f'PyAV {av.__version__} is too old, 16 is needed')
    except ImportError as error:
        raise MissingLibraryError(f"videos need PyAV ({error}): pip install 'dpmambair_basicsr[video]'") from error
    return av


@contextmanager
def as_value_error(what: str) -> Iterator[None]:
    """FFmpeg's errors, most of which derive from Exception only, become a ValueError: `what` and FFmpeg's reason."""
    try:
        yield
    except import_av().error.FFmpegError as error:
        if isinstance(error, OSError | MemoryError):
            raise
        raise ValueError(f'{what} ({error.strerror})') from None


@contextmanager
def opened(path: Path):
    """Open a video as PyAV's container.

    Raises:
        OSError, ValueError: it cannot be read, or is not a supported video.
    """
    av = import_av()
    with ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        with as_value_error(f'not a {path.suffix.lower()} video'):
            container = stack.enter_context(av.open(file, format=VIDEOS[path.suffix.lower()].demuxer))
        stream = film_of(container)
        if stream is None:
            raise ValueError('has no video stream')
        context = stream.codec_context
        if context is None:
            raise ValueError('has a video codec that this FFmpeg cannot decode')
        if context.color_trc in HDR:
            raise ValueError(f'is HDR video ({HDR[context.color_trc]}); our networks are trained on sRGB pictures')
        if context.width * context.height > max_pixels():
            raise ValueError(f'has frames of {context.width} x {context.height} pixels, more than max_pixels')
        yield container


def film_of(container) -> Any:
    return next((stream for stream in container.streams.video if kind_of(stream) == 'video'), None)


def kind_of(stream) -> str:
    """FFmpeg's type; 'cover' or 'thumbnails' for a picture that FFmpeg shows as a video stream."""
    picture = import_av().stream.Disposition.attached_pic
    if stream.disposition & picture:
        return 'cover' if stream.disposition == picture else 'thumbnails'
    return stream.type


def read_frames(path: Path) -> Iterator[Frame]:
    """All frames, in order.

    Raises:
        OSError, ValueError: as `opened` and `packets_of`; a frame is damaged, interlaced or without a timestamp.
    """
    with opened(path) as container:
        stream = film_of(container)
        for packet in packets_of(container):
            if packet.stream is stream:
                yield from decoded(packet)


def packets_of(container) -> Iterator[Any]:
    """All packets, in order.

    Raises:
        ValueError: they cannot be read; or they end before the video's stated duration, as in a file that is cut off.
    """
    film, times, end = film_of(container), [], 0.0  # in seconds
    with as_value_error('cannot be read'):
        for packet in container.demux():
            if packet.pts is not None:
                time = float(packet.pts * packet.time_base)
                end = max(end, time + float((packet.duration or 0) * packet.time_base))
                times += [time] * (packet.stream is film)
            yield packet
    longest = max((after - before for before, after in pairwise(sorted(times))), default=0.0)
    duration = (container.duration or 0) / import_av().time_base
    if end + max(longest, 1.0) < duration:  # not every container says how long the last frame is shown
        raise ValueError(f'is damaged or cut off: it ends after {end:.2f} of {duration:.2f} s')


def decoded(packet) -> Iterator[Frame]:
    with as_value_error('its frames cannot be read'):
        for frame in packet.decode():
            place = 'a frame' if frame.time is None else f'the frame at {frame.time:.2f} s'
            if frame.pts is None:
                raise ValueError('has frames without a timestamp')
            if frame.is_corrupt:
                raise ValueError(f'{place} is damaged')
            if frame.interlaced_frame:
                raise ValueError(f'{place} is interlaced; deinterlace the video first')
            deep = max(component.bits for component in frame.format.components) > 8
            image = frame.to_ndarray(format='rgb48le' if deep else 'rgb24')
            yield Frame(np.ascontiguousarray(np.rot90(image, frame.rotation // 90)), frame)


class VideoWriter:
    """Writes a copy of a video with other frames.

    Attributes:
        lost: what the result does not keep, as text for users.
    """

    def __init__(self, result, source, path: Path):
        self.result, self.stream, self.out = result, film_of(source), None
        self.container = VIDEOS[path.suffix.lower()]
        result.metadata.update(source.metadata)
        result.set_chapters(source.chapters())
        self.copies, self.lost, self.waiting = {}, [], []
        for stream in source.streams:
            if stream is not self.stream:
                self.copy_stream(stream)

    def copy_stream(self, stream) -> None:
        kind, copy = kind_of(stream), None
        if kind == 'data':  # see `copy_packet`
            return
        if ONLY_IN.get(kind, self.container.muxer) == self.container.muxer:
            with suppress(ValueError, NotImplementedError):  # the container does not support this type or codec
                copy = self.result.add_stream_from_template(stream)
        if copy is None:
            self.lost.append(f'{kind} stream {stream.index}')
            return
        copy.metadata.update(stream.metadata)
        copy.disposition = stream.disposition
        self.copies[stream.index] = copy

    def write(self, frame: Frame, image: np.ndarray) -> None:
        """Write `image`, (h, w, 3), of the same type, instead of `frame.image`; all frames have the same size."""
        av = import_av()
        if self.out is None:
            self.out = self.video_stream(frame, image)
            for packet in self.waiting:
                self.copy_packet(packet)
        out = self.out
        written = av.VideoFrame.from_ndarray(image, format='rgb24' if image.dtype == np.uint8 else 'rgb48le')
        written = written.reformat(
            format=out.pix_fmt, dst_colorspace=frame.source.colorspace, dst_color_range=frame.source.color_range
        )
        written.pts, written.time_base = frame.source.pts, frame.source.time_base
        self.result.mux(out.encode(written))

    def video_stream(self, frame: Frame, image: np.ndarray):
        context = self.stream.codec_context
        rate = self.stream.average_rate or self.stream.guessed_rate
        out = self.result.add_stream(self.container.encoder, rate=rate, options=self.container.options)
        out.height, out.width = image.shape[:2]
        out.pix_fmt = pixel_format(out.codec, frame.source.format.name, image)
        if out.pix_fmt != frame.source.format.name:
            self.lost.append(f'pixel format {frame.source.format.name}, now {out.pix_fmt}')
        out.codec_context.time_base = self.stream.time_base
        ratio = context.sample_aspect_ratio
        if ratio:
            out.codec_context.sample_aspect_ratio = ratio if frame.source.rotation % 180 == 0 else 1 / ratio
        for name in ('color_range', 'colorspace', 'color_primaries', 'color_trc'):
            setattr(out.codec_context, name, getattr(context, name))
        out.metadata.update(self.stream.metadata)
        return out

    def copy_packet(self, packet) -> None:
        if packet.size == 0:
            return
        stream = packet.stream
        if stream.type == 'data' and 'timecode' not in stream.metadata:  # chapters have no packets, see `set_chapters`
            self.lost += [f'data stream {stream.index}'] * (f'data stream {stream.index}' not in self.lost)
        if stream.index not in self.copies:
            return
        if self.out is None:  # streams must be added before the first packet, and the video's size is not known yet
            self.waiting.append(packet)
            return
        packet.stream = self.copies[stream.index]
        self.result.mux(packet)

    def finish(self) -> None:
        if self.out is None:
            raise ValueError('has no frames')
        self.result.mux(self.out.encode(None))


def pixel_format(codec, name: str, image: np.ndarray) -> str:
    """The video's pixel format if the encoder supports it; otherwise the closest one with the same number of bits."""
    known = {form.name for form in codec.video_formats}
    odd = image.shape[0] % 2 or image.shape[1] % 2
    if name in known and not (odd and '420' in name and codec.name == 'libx264'):
        return name
    deep = '10le' if image.dtype == np.uint16 and 'yuv420p10le' in known else ''
    return ('yuv444p' if odd or '444' in name else 'yuv420p') + deep


def rewrite(source: Path, target: Path, restore: Callable[[Frame], np.ndarray]) -> list[str]:
    """Write a copy of the video with each frame replaced by restore(frame). Returns what the copy does not keep.

    Raises:
        OSError, ValueError: as `read_frames`; or the result cannot be written. No result is left then.
    """
    av = import_av()
    container = VIDEOS[target.suffix.lower()]
    with (
        opened(source) as film,
        as_value_error('the result cannot be written'),
        replacing(target) as part,
        av.open(str(part), 'w', format=container.muxer) as result,
    ):
        writer = VideoWriter(result, film, target)
        for packet in packets_of(film):
            if packet.stream is not writer.stream:
                writer.copy_packet(packet)
                continue
            for frame in decoded(packet):
                writer.write(frame, restore(frame))
        writer.finish()
    return writer.lost
