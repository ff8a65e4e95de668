"""The size of an image is read before it is decoded; the limit is named, and can be raised."""

import os
import resource
import struct
import zlib

import cv2
import numpy as np
import pytest
from support import forked
from support.forked import Training, changed, train

from dpmambair_basicsr.files.codec import MAX_PIXELS, MAX_PIXELS_VARIABLE, decode, image_size, max_pixels
from dpmambair_basicsr.files.images import ImageReader
from dpmambair_basicsr.files.pictures import read_picture
from dpmambair_basicsr.prepare.images import read as read_download


def bomb(width: int = 32000, height: int = 32000) -> bytes:
    """A PNG with one bit per pixel, all black."""
    packer = zlib.compressobj(9)
    rows = bytes(100 * (1 + width // 8))
    packed = b''.join(packer.compress(rows) for _ in range(height // 100)) + packer.flush()
    chunks = {b'IHDR': struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0), b'IDAT': packed, b'IEND': b''}
    parts = [
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def tiled_tiff(side: int) -> bytes:
    """A grey TIFF of 16 x 16 pixels, with one missing tile of another size."""
    fields = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 16}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in fields.items())
    return b'II*\0' + struct.pack('<IH', 8, len(fields)) + entries + bytes(4 + 16)


@pytest.fixture(scope='module')
def bomb_file(tmp_path_factory):
    file = tmp_path_factory.mktemp('bomb') / '3.png'
    file.write_bytes(bomb())
    return file


@pytest.mark.parametrize(
    'read',
    [
        lambda file: ImageReader({'type': 'disk'}, {'lq': str(file.parent)}).read(str(file), 'lq', 3),
        read_picture,
        read_download,
    ],
    ids=['datasets', 'restore', 'prepare'],
)
def test_a_decompression_bomb_is_refused_by_its_header(read, bomb_file):
    assert bomb_file.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = f'is 32000 x 32000 pixels, more than max_pixels, {MAX_PIXELS}; .*{MAX_PIXELS_VARIABLE}'
    with pytest.raises(ValueError, match=message):
        read(bomb_file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, 'KiB'


FORMATS = ('.png', '.jpg', '.bmp', '.webp', '.tiff', '.gif', '.jp2', '.avif', '.ppm', '.ras')


@pytest.mark.parametrize('extension', FORMATS)
def test_the_limit_is_exact_in_every_format(extension, monkeypatch):
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    try:
        _, content = cv2.imencode(extension, image)
    except cv2.error:
        pytest.skip(f'this OpenCV writes no {extension}')
    content = content.tobytes()
    assert image_size(content) == (60, 40)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, '2400')
    assert decode(content).shape == (40, 60, 3)
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, '2399')
    with pytest.raises(ValueError, match='is 60 x 40 pixels, more than max_pixels, 2399'):
        decode(content)


def test_the_limit_applies_to_tiff_tiles(monkeypatch):
    assert image_size(tiled_tiff(16)) == (16, 16)
    with pytest.raises(ValueError, match='is 30000 x 30000 pixels'):
        decode(tiled_tiff(30000))


@pytest.mark.parametrize('text', ['0', '-1', 'x', '1e9', ''])
def test_an_invalid_limit_is_named(text, monkeypatch):
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, text)
    with pytest.raises(ValueError, match=f"^{MAX_PIXELS_VARIABLE}: expected a positive int, got '{text}'$"):
        max_pixels()


@pytest.fixture
def opt(tmp_path):
    """Images of 12 x 14 pixels."""
    opt = changed(forked.options(forked.write_images(tmp_path / 'images')), {'train.total_iter': 2})
    return changed(opt, {'datasets.train.batch_size_per_gpu': 7})


@pytest.mark.parametrize('dataset', ['PairedDegradationDataset', 'PairedImageDataset'])
def test_training_refuses_a_bomb_and_the_option_raises_the_limit(dataset, opt, tmp_path, bomb_file):
    opt['datasets']['train'] |= {'type': dataset, 'io_backend': {'type': 'disk'}, 'num_worker_per_gpu': 1}
    train(opt | {'max_pixels': 12 * 14}, tmp_path / 'enough')
    for name, content, limit in (('of 168', None, 12 * 14 - 1), ('bomb', bomb_file.read_bytes(), MAX_PIXELS)):
        if content:
            (tmp_path / 'images/lq/3.png').write_bytes(content)
        run = Training(opt | {'max_pixels': limit}, tmp_path / name)
        assert run.status() == 1, run.log()
        assert f'pixels, more than max_pixels, {limit}; ' in run.log()
        assert ('/3.png' if content else '.png') in run.log()


def test_the_limit_applies_to_crops(opt, tmp_path):
    """Small images are mirrored up to it: gt_size 10^6 would take 3 TB."""
    opt['datasets']['train'] |= {'gt_size': 10**6, 'pad_small': True}
    run = Training(opt, tmp_path)
    assert run.status() == 1
    assert (
        f'datasets.train: dataset train set: crops of gt_size 1000000 have more than max_pixels, {MAX_PIXELS}'
        in run.log()
    )
    assert not (tmp_path / 'experiments').exists()


@pytest.mark.parametrize('dataset', ['PairedDegradationDataset', 'PairedImageDataset'])
def test_a_fifo_in_a_list_of_images_does_not_block(dataset, opt, tmp_path):
    (tmp_path / 'list.txt').write_text('fifo.png (12,14,3)\n' + ''.join(f'{n}.png (12,14,3)\n' for n in range(6)))
    for role in ('lq', 'gt'):
        os.mkfifo(tmp_path / 'images' / role / 'fifo.png')
    opt['datasets']['train'] |= {'meta_info_file': str(tmp_path / 'list.txt'), 'type': dataset}
    opt['datasets']['train'] |= {'io_backend': {'type': 'disk'}}
    run = Training(opt, tmp_path)
    assert run.status() == 1
    assert '/fifo.png: not a regular file' in run.log()
