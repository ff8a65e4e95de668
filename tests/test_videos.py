"""Videos: the same number of frames, times and sound as the input; a shot is restored with one set of statistics."""

import sys
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dpmambair_basicsr import restore
from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.archs.blocks import ImageMean
from dpmambair_basicsr.files.videos import VIDEOS, read_frames, rewrite
from dpmambair_basicsr.inference.restorer import Restorer
from dpmambair_basicsr.inference.video import SAMPLES, find_in, find_shots, measure, restore_video

av = pytest.importorskip('av', reason="needs PyAV: extra 'video'")
CPU = torch.device('cpu')
NETWORK = {'type': 'VmambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
TIMES = [0, 1, 2, 4, 5, 8, 9, 10, 13, 14, 15, 16]  # in 1/25 s: variable frame rate


def scene(seed: int, low: int, high: int) -> np.ndarray:
    colours = np.random.default_rng(seed).integers(low, high, (6, 8, 3), np.uint8)
    return cv2.resize(colours, (64, 48), interpolation=cv2.INTER_CUBIC)


def write_video(path, images, *, form='yuv420p', codec='libx264', sound=True, change=None, **context):
    """A video of (h, w, 3) uint8 or uint16 images at `TIMES`; `context` and `change` are for the video stream."""
    with av.open(str(path), 'w') as file:
        stream = file.add_stream(codec, rate=25, options={'crf': '4', 'bf': '2'})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], form
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if change is not None:
            change(stream)
        tone = file.add_stream('aac' if codec == 'libx264' else 'libopus', rate=48000) if sound else None
        file.metadata['title'] = 'two scenes'
        for time, image in zip(TIMES, images, strict=False):
            frame = av.VideoFrame.from_ndarray(image, format='rgb24' if image.dtype == np.uint8 else 'rgb48le')
            space = {'dst_colorspace': context['colorspace']} if 'colorspace' in context else {}
            frame = frame.reformat(format=form, **space)
            frame.pts, frame.time_base = time, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound:
            wave = np.sin(np.arange(24000) / 20).astype(np.float32)[None]
            part = av.AudioFrame.from_ndarray(wave, format='flt' if codec != 'libx264' else 'fltp', layout='mono')
            part.sample_rate, part.pts = 48000, 0
            file.mux(tone.encode(part))
            file.mux(tone.encode(None))
    return path


def streams_of(path):
    """Frame times in seconds; (time, bytes) of all audio packets; properties of the video stream."""
    with av.open(str(path)) as file:
        video = file.streams.video[0]
        context = video.codec_context
        times, sound = [], []
        for packet in file.demux():
            if packet.stream is video:
                times += [round(float(frame.time), 3) for frame in packet.decode()]
            elif packet.dts is not None:
                sound.append((round(float(packet.pts * packet.time_base), 3), bytes(packet)))
        said = context.pix_fmt, context.colorspace, context.color_range, context.color_primaries, context.color_trc
        return times, sound, (*said, context.sample_aspect_ratio, file.metadata.get('title'))


def images_of(path):
    return [frame.image for frame in read_frames(path)]


def psnr(a, b):
    peak = np.iinfo(a.dtype).max
    return 10 * np.log10(peak**2 / np.square(a.astype(float) - b).mean())


SCENES = [scene(0, 100, 200)] * 6 + [scene(1, 30, 130)] * 6


@pytest.mark.parametrize('extension', VIDEOS)
def test_only_the_pixels_of_the_result_differ(extension, tmp_path):
    codec = VIDEOS[extension].encoder
    source = write_video(tmp_path / f'a{extension}', SCENES, codec=codec, sample_aspect_ratio=Fraction(4, 3))
    assert rewrite(source, tmp_path / f'b{extension}', lambda frame: 255 - frame.image) == []
    before, after = (streams_of(tmp_path / f'{name}{extension}') for name in 'ab')
    assert len(before[0]) == len(TIMES) and before[1]
    assert before == after
    for was, now in zip(images_of(source), images_of(tmp_path / f'b{extension}'), strict=True):
        assert psnr(255 - was, now) > 35


@pytest.mark.parametrize(
    ('form', 'context'),
    [
        ('yuv420p', {'colorspace': 1, 'color_primaries': 1, 'color_trc': 1, 'color_range': 1}),  # BT.709, limited range
        ('yuvj420p', {'color_range': 2}),
        ('yuv444p', {}),
        ('yuv422p10le', {}),
    ],
)
def test_colours_and_bit_depth_are_kept(form, context, tmp_path):
    deep = form.endswith('10le')
    images = [image.astype(np.uint16) * 257 if deep else image for image in SCENES]
    source = write_video(tmp_path / 'a.mkv', images, form=form, **context)
    assert rewrite(source, tmp_path / 'b.mkv', lambda frame: frame.image) == []
    assert streams_of(source)[2] == streams_of(tmp_path / 'b.mkv')[2]
    seen = images_of(source)
    assert seen[0].dtype == (np.uint16 if deep else np.uint8)
    assert psnr(images[0], seen[0]) > 25, 'the colours that were written'
    for was, now in zip(seen, images_of(tmp_path / 'b.mkv'), strict=True):
        assert psnr(was, now) > 40


@pytest.mark.parametrize('angle', [90, -90, 180])
def test_frames_are_upright(angle, tmp_path):
    """As players show them: FFmpeg's angle is counterclockwise."""
    source = write_video(tmp_path / 'a.mp4', SCENES, change=lambda stream: stream.set_display_rotation(angle))
    expected = np.rot90(SCENES[0], angle // 90)
    assert images_of(source)[0].shape == expected.shape and psnr(expected, images_of(source)[0]) > 25
    rewrite(source, tmp_path / 'b.mp4', lambda frame: frame.image)
    assert psnr(expected, images_of(tmp_path / 'b.mp4')[0]) > 25


CHAPTERS = [
    {'id': 1, 'start': 0, 'end': 200, 'time_base': Fraction(1, 1000), 'metadata': {'title': 'one'}},
    {'id': 2, 'start': 200, 'end': 480, 'time_base': Fraction(1, 1000), 'metadata': {'title': 'two'}},
]


def write_with_extras(path, *, chapters=(), timecode=None, data=None, cover=None, font=None):
    plain = write_video(path.with_name(f'plain{path.suffix}'), SCENES)
    with av.open(str(plain)) as source, av.open(str(path), 'w') as file:
        copies = [file.add_stream_from_template(stream) for stream in source.streams]
        file.set_chapters(list(chapters))
        if timecode is not None:
            copies[0].metadata['timecode'] = timecode
        if font is not None:
            file.add_attachment('a.ttf', 'font/ttf', font)
        extras = []
        if data is not None:
            extras.append((file.add_data_stream('bin_data'), data))
        if cover is not None:
            picture = file.add_stream('mjpeg', pix_fmt='yuvj420p', height=48, width=64)
            picture.disposition = av.stream.Disposition.attached_pic
            extras.append((picture, cover))
        for stream, content in extras:
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 1000)
            packet.duration = 100
            file.mux(packet)
        for packet in source.demux():
            if packet.size:
                packet.stream = copies[packet.stream.index]
                file.mux(packet)
    plain.unlink()
    return path


def extras_of(path):
    """Chapters as (title, start in seconds), timecode, covers, attachments."""
    with av.open(str(path)) as file:
        chapters = [(part['metadata']['title'], float(part['start'] * part['time_base'])) for part in file.chapters()]
        covers = [stream for stream in file.streams.video if stream.disposition & av.stream.Disposition.attached_pic]
        pictures = [bytes(packet) for packet in file.demux(covers) if packet.size] if covers else []
        film = next(stream for stream in file.streams.video if stream not in covers)
        tags = {name.lower(): value for name, value in film.metadata.items()}
        fonts = [stream.data for stream in file.streams if stream.type == 'attachment']
        return chapters, tags.get('timecode'), pictures, fonts


@pytest.mark.parametrize(
    ('before', 'after', 'extras', 'lost'),
    [
        ('a.mov', 'b.mov', {'timecode': '01:00:00:00'}, []),
        ('a.mov', 'b.mkv', {'timecode': '01:00:00:00'}, []),
        ('a.mp4', 'b.mp4', {'chapters': CHAPTERS}, []),
        ('a.mkv', 'b.mkv', {'chapters': CHAPTERS}, []),
        ('a.mkv', 'b.mov', {'chapters': CHAPTERS}, []),
        ('a.mp4', 'b.mkv', {'chapters': CHAPTERS}, []),
        ('a.mp4', 'b.mp4', {'data': b'telemetry'}, ['data stream 2']),
        ('a.mp4', 'b.mp4', {'cover': cv2.imencode('.jpg', SCENES[0])[1].tobytes()}, []),
        ('a.mp4', 'b.mkv', {'cover': cv2.imencode('.jpg', SCENES[0])[1].tobytes()}, ['cover stream 2']),
        ('a.mp4', 'b.mov', {'cover': cv2.imencode('.jpg', SCENES[0])[1].tobytes()}, ['cover stream 2']),
        ('a.mkv', 'b.mkv', {'font': b'letters'}, []),
        ('a.mkv', 'b.mp4', {'font': b'letters'}, ['attachment stream 2']),
    ],
)
def test_what_goes_with_a_film_is_kept_or_named(before, after, extras, lost, tmp_path):
    source, result = write_with_extras(tmp_path / before, **extras), tmp_path / after
    assert rewrite(source, result, lambda frame: frame.image) == lost
    expected = (
        [('one', 0.0), ('two', 0.2)] if 'chapters' in extras else [],
        extras.get('timecode'),
        [extras['cover']] if 'cover' in extras else [],
        [extras['font']] if 'font' in extras else [],
    )
    had, has = extras_of(source), extras_of(result)
    assert had == expected and has == (([], None, [], []) if lost else expected)
    assert len(images_of(result)) == len(TIMES) and streams_of(result)[1]


def test_a_second_film_keeps_all_its_frames(tmp_path):
    """In Matroska, the first packets have no decoding time."""
    with av.open(str(write_video(tmp_path / 'one.mkv', SCENES))) as one, av.open(str(tmp_path / 'a.mkv'), 'w') as file:
        copies = [file.add_stream_from_template(one.streams.video[0]) for _ in range(2)]
        for packet in one.demux(video=0):
            if packet.size:
                twin = av.Packet(bytes(packet))
                twin.pts, twin.dts, twin.time_base = packet.pts, packet.dts, packet.time_base
                packet.stream, twin.stream, twin.is_keyframe = *copies, packet.is_keyframe
                file.mux([packet, twin])
    assert rewrite(tmp_path / 'a.mkv', tmp_path / 'b.mkv', lambda frame: frame.image) == []
    with av.open(str(tmp_path / 'b.mkv')) as file:
        packets = [packet.stream.index for packet in file.demux() if packet.size]
    assert packets.count(0) == packets.count(1) == len(TIMES)


class ToMean(nn.Module):
    """Sets each pixel to the mean of the image, as provided by `ImageMean`."""

    def __init__(self):
        super().__init__()
        self.mean = ImageMean()

    def forward(self, x):
        return self.mean(x).expand_as(x)


def test_brightness_is_steady_over_a_shot_and_follows_a_cut(tmp_path):
    rng = np.random.default_rng(0)
    noisy = [np.uint8(np.clip(image + rng.normal(rng.normal(0, 10), 9, image.shape), 0, 255)) for image in SCENES]
    source = write_video(tmp_path / 'a.mkv', noisy, form='yuv444p')
    restorer, shots = Restorer(ToMean(), CPU), find_shots(source)
    assert [(shot.first, shot.end) for shot in shots] == [(0, 6), (6, 12)]
    find_in(restorer, source, shots)
    measure(restorer, source, shots, None)
    seen = []
    restore_video(restorer, source, tmp_path / 'b.mkv', shots, seen.append)
    assert seen == [*range(1, 13)]
    means = [image.mean(axis=(0, 1)) for image in images_of(tmp_path / 'b.mkv')]
    alone = [restorer.restore(image).mean(axis=(0, 1)) for image in images_of(source)]
    assert np.std(alone[:6], axis=0).min() > 2 and np.ptp(means[:6], axis=0).max() < 1
    assert np.abs(means[0] - means[6]).max() > 3
    sampled = [alone[number] for number in shots[0].samples]
    np.testing.assert_allclose(np.mean(sampled, axis=0), means[0], atol=1.5)


@pytest.mark.parametrize('length', [1, 2, SAMPLES, 100])
def test_samples_are_frames_of_the_shot(length):
    from dpmambair_basicsr.inference.video import Shot

    samples = Shot(7, 7 + length).samples
    assert samples == sorted(set(samples)) and len(samples) == min(length, SAMPLES)
    assert all(7 <= number < 7 + length for number in samples)


def test_frames_of_a_shot_are_restored_as_pictures_with_its_statistics(tmp_path):
    torch.manual_seed(0)
    net = VmambaIR(**{name: value for name, value in NETWORK.items() if name != 'type'})
    nn.init.normal_(net.output.weight, 0, 0.02)
    source, restorer = write_video(tmp_path / 'a.mkv', SCENES, form='yuv444p'), Restorer(net, CPU)
    shots = find_shots(source)
    find_in(restorer, source, shots)
    measure(restorer, source, shots, None, tile=32)
    restore_video(restorer, source, tmp_path / 'b.mkv', shots, lambda done: None, tile=32)
    means = [shots[number // 6].means for number in range(12)]
    pairs = zip(images_of(source), means, images_of(tmp_path / 'b.mkv'), strict=True)
    for image, mean, result in pairs:
        expected = restorer.restore(image, tile=32, means=mean)
        assert psnr(expected, result) > 28 > psnr(image, result)


# Foreign files


def test_unsupported_videos_are_refused_in_one_line(tmp_path):
    write_video(tmp_path / 'hdr.mkv', SCENES, color_trc=16)
    (tmp_path / 'text.mp4').write_text('no video')
    unknown = write_video(tmp_path / 'a.mp4', SCENES).read_bytes().replace(b'avc1', b'zzzz')
    (tmp_path / 'unknown.mp4').write_bytes(unknown)
    (tmp_path / 'list.mp4').write_text('#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n')
    with av.open(str(tmp_path / 'sound.mkv'), 'w') as file:
        tone = file.add_stream('aac', rate=48000)
        part = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format='fltp', layout='mono')
        part.sample_rate = 48000
        file.mux(tone.encode(part))
        file.mux(tone.encode(None))
    expected = {
        'hdr.mkv': 'is HDR video .PQ',
        'text.mp4': 'not a .mp4 video',
        'list.mp4': 'not a .mp4 video',
        'sound.mkv': 'has no video stream',
        'unknown.mp4': 'has a video codec that this FFmpeg cannot decode',
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            rewrite(tmp_path / name, tmp_path / 'result.mkv', lambda frame: frame.image)
    assert not [*tmp_path.glob('*result*')], 'nor a part of one'


def test_an_error_midway_leaves_no_file(tmp_path):
    source, seen = write_video(tmp_path / 'a.mkv', SCENES), []

    def fail(frame):
        seen.append(frame)
        if len(seen) == 5:
            raise MemoryError
        return frame.image

    with pytest.raises(MemoryError):
        rewrite(source, tmp_path / 'b.mkv', fail)
    assert [file.name for file in tmp_path.iterdir()] == ['a.mkv']


def write_slides(path, start=0, seconds=(0, 1, 2, 7, 8, 13), sound=0):
    """A picture at each time, in seconds after `start`, and silence of that many seconds."""
    with av.open(str(path), 'w') as file:
        stream = file.add_stream('libx264', rate=1, options={'g': '1', 'bf': '0'})
        stream.height, stream.width = 48, 64
        tone = file.add_stream('aac', rate=48000) if sound else None
        packets = []
        for number, second in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(scene(number, 0, 255), format='rgb24')
            frame.pts, frame.time_base = start + second, Fraction(1)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if tone is not None:
            part = av.AudioFrame.from_ndarray(np.zeros((1, 48000 * sound), np.float32), format='fltp', layout='mono')
            part.sample_rate, part.pts = 48000, 0
            packets += tone.encode(part) + tone.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            file.mux(packet)
    return path


@pytest.mark.parametrize('extension', ['.mkv', '.mp4'])
@pytest.mark.parametrize('slides', [{}, {'sound': 20}, {'sound': 2}, {'start': 100}])
def test_a_video_that_ends_before_its_stated_duration_is_refused(extension, slides, tmp_path):
    """Only then: neither sound of another length, nor long pauses, nor a late start make it damaged."""
    good = write_slides(tmp_path / f'good{extension}', **slides)
    assert len(images_of(good)) == 6
    content, cut = good.read_bytes(), tmp_path / f'cut{extension}'
    cut.write_bytes(content[: len(content) * 4 // 10])
    with pytest.raises(ValueError, match='is damaged or cut off' if extension == '.mkv' else 'not a .mp4 video'):
        rewrite(cut, tmp_path / 'result.mkv', lambda frame: frame.image)
    assert not [*tmp_path.glob('*result*')]


@pytest.mark.parametrize(
    ('method', 'error', 'message'),
    [
        ('demux', 'ExternalError', 'cannot be read .why.'),
        ('mux', 'UnknownError', 'the result cannot be written .why.'),
        ('add_stream', 'EncoderNotFoundError', 'the result cannot be written .why.'),
    ],
)
def test_any_error_of_ffmpeg_is_one_of_the_file(method, error, message, tmp_path, monkeypatch):
    """A ValueError: the command continues with the next file."""
    source, open_any = write_video(tmp_path / 'a.mkv', SCENES), av.open

    def fail(*args, **options):
        raise getattr(av.error, error)(1, 'why')

    class Failing:
        def __init__(self, container):
            self.container = container

        def __enter__(self):
            self.container.__enter__()
            return self

        def __exit__(self, *error):
            return self.container.__exit__(*error)

        def __getattr__(self, name):
            return fail if name == method else getattr(self.container, name)

    monkeypatch.setattr(av, 'open', lambda *args, **options: Failing(open_any(*args, **options)))
    with pytest.raises(ValueError, match=message):
        rewrite(source, tmp_path / 'b.mkv', lambda frame: frame.image)
    assert [file.name for file in tmp_path.iterdir()] == ['a.mkv']


# The command


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    net = VmambaIR(**{name: value for name, value in NETWORK.items() if name != 'type'})
    torch.save({'params': net.state_dict(), 'network_g': NETWORK}, tmp_path / 'w.pth')
    return tmp_path / 'w.pth'


def command(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr(sys, 'argv', ['restore', *map(str, arguments), '--device', 'cpu'])
    status = restore.main()
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_folder_may_contain_videos_and_pictures(weights, tmp_path, monkeypatch, capsys):
    from PIL import Image

    (tmp_path / 'in').mkdir()
    write_video(tmp_path / 'in/film.mp4', SCENES)
    Image.fromarray(SCENES[0]).save(tmp_path / 'in/photo.png')
    (tmp_path / 'in/broken.mov').write_text('x')
    page = tmp_path / 'page.html'
    options = ('-w', weights, '--ext', 'webp', '--report', page, '--compare', '--one-pass')
    status, said = command(monkeypatch, capsys, tmp_path / 'in', '-o', tmp_path / 'out', *options)
    assert status == 1 and 'broken.mov: not a .mov video' in said
    assert f'{tmp_path}/in/film.mp4: 12 frames, 2 shots, ' in said and '2 restored, 1 failed' in said
    assert sorted(file.name for file in (tmp_path / 'out').iterdir()) == ['compare', 'film.mp4', 'photo.webp']
    line = next(line for line in said.splitlines() if 'film.mp4: ' in line)
    assert '--compare applies to pictures only' in line and '--one-pass applies to pictures only' in line
    assert streams_of(tmp_path / 'out/film.mp4')[:2] == streams_of(tmp_path / 'in/film.mp4')[:2]
    assert page.read_text().count('type="range"') == 2, 'a slider for each, of a first frame'


def test_a_clean_video_is_copied(tmp_path, monkeypatch, capsys):
    """By the shipped weights' classifier."""
    from dpmambair_basicsr.inference.degradation_classifier import DegradationClassifier, Finding

    monkeypatch.setattr(
        DegradationClassifier, 'find', lambda self, image: Finding({'clean': 0.9, 'rain': 0.1}, 1.0, True)
    )
    source = write_video(tmp_path / 'a.mp4', SCENES)
    status, said = command(monkeypatch, capsys, source, '-o', tmp_path / 'b.mp4')
    assert status == 0 and '1 left unchanged' in said
    assert (tmp_path / 'b.mp4').read_bytes() == source.read_bytes()
    options = ('-o', tmp_path / 'b.mkv', '--report', tmp_path / 'page.html')
    status, said = command(monkeypatch, capsys, source, *options)
    assert status == 0 and '1 left unchanged' in said and 'encoded again, for .mkv' in said
    assert (tmp_path / 'b.mkv').read_bytes()[:4] == b'\x1a\x45\xdf\xa3', 'Matroska'
    before, after = (np.diff(streams_of(file)[0]) for file in (source, tmp_path / 'b.mkv'))
    np.testing.assert_allclose(before, after, atol=0.002)  # Matroska starts with the sound, 21 ms before
    assert streams_of(tmp_path / 'b.mkv')[1]
    for was, now in zip(images_of(source), images_of(tmp_path / 'b.mkv'), strict=True):
        assert psnr(was, now) > 40
    assert 'left unchanged' in (tmp_path / 'page.html').read_text()


def test_an_output_of_another_kind_is_refused_up_front(weights, tmp_path, monkeypatch, capsys):
    source = write_video(tmp_path / 'a.mp4', SCENES)
    with pytest.raises(SystemExit, match='a.png: .*a.mp4 is a video; expected such a file'):
        command(monkeypatch, capsys, source, '-o', tmp_path / 'a.png', '-w', weights)


def test_without_pyav_it_says_what_to_install(weights, tmp_path, monkeypatch, capsys):
    source = write_video(tmp_path / 'a.mp4', SCENES)
    monkeypatch.setitem(sys.modules, 'av', None)
    status, said = command(monkeypatch, capsys, source, '-o', tmp_path / 'out', '-w', weights)
    assert status == 1 and "pip install 'dpmambair_basicsr[video]'" in said
