"""Pixels of unusual files have the right values, in restored pictures and in datasets, or the file is refused."""

import struct

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from dpmambair_basicsr.files import avif, tiff
from dpmambair_basicsr.files.exif import Exif
from dpmambair_basicsr.files.full_range import full_range
from dpmambair_basicsr.files.ifd import Tag, write_ifd
from dpmambair_basicsr.files.images import ImageReader
from dpmambair_basicsr.files.pictures import read_picture, read_pictures, write_picture
from dpmambair_basicsr.results.page import read_image as by_pages


def by_restore(file):
    return read_picture(file).image


def by_datasets(file):
    return ImageReader({'type': 'disk'}, {'lq': str(file.parent)}).read(str(file), 'lq', 0)


READERS = pytest.mark.parametrize('read', [by_restore, by_datasets])


def ramp(white, channels, dtype=None):
    """All shades from 0 to white, in 64 rows; the last channel is reversed."""
    values = np.linspace(0, white, 64).round().astype(dtype or (np.uint8 if white < 256 else np.uint16))
    image = np.repeat(np.tile(values, (64, 1))[..., None], channels, 2)
    image[..., -1] = image[:, ::-1, -1] if channels > 1 else image[..., -1]
    return image


def full(image, white):
    """(H, W, 3), with white as the maximum of its type."""
    top = 255 if white < 256 else 65535
    return np.repeat((image.astype(int) * top * 2 + white) // (2 * white), 3 // image.shape[2], 2)


@READERS
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('bits', [8, 10, 12])
def test_avif_of_every_depth_fills_the_range(bits, channels, read, tmp_path):
    white = 2**bits - 1
    image = ramp(white, channels)
    parameters = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
    cv2.imwrite(str(tmp_path / 'a.avif'), image[..., ::-1], parameters)
    result = read(tmp_path / 'a.avif')
    assert result.dtype == (np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_array_equal(result, full(image, white))


def test_avif_without_a_depth_is_refused():
    content = cv2.imencode('.avif', ramp(1023, 3), [cv2.IMWRITE_AVIF_DEPTH, 10])[1].tobytes()
    no_pixi, no_av1 = content.replace(b'pixi', b'free'), content.replace(b'av1C', b'free')
    assert [avif.depth(part) for part in (content, no_pixi, no_av1)] == [10, 10, 10]
    for length in range(12, content.find(b'mdat')):  # damaged ones
        assert avif.depth(content[:length]) in (10, None) and avif.orientation(content[:length]) == 1
    with pytest.raises(ValueError, match='^has an unknown number of bits$'):
        full_range(ramp(1023, 3), no_pixi.replace(b'av1C', b'free'))


@READERS
@pytest.mark.parametrize('white', [1, 15, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize('kind', [2, 3, 5, 6])
def test_pnm_of_every_maximum_fills_the_range(kind, white, read, tmp_path):
    image = ramp(white, 1 if kind in (2, 5) else 3)
    header = f'P{kind}\n# 1 2 3\n64 # a comment\n64\n#\n{white}\n'.encode()
    text = ' '.join(map(str, image.ravel())).encode() + b'\n'
    data = image.astype('>u2' if white > 255 else 'u1').tobytes()
    (tmp_path / 'a.ppm').write_bytes(header + (text if kind < 4 else data))
    result = read(tmp_path / 'a.ppm')
    assert result.dtype == (np.uint8 if white < 256 else np.uint16)
    np.testing.assert_allclose(result, full(image, white), atol=kind < 4)  # OpenCV rounds down in text


def test_pnm_values_above_its_maximum_are_white(tmp_path):
    (tmp_path / 'a.pgm').write_bytes(b'P5 3 1 15\n\x20\x0f\x08')
    assert read_picture(tmp_path / 'a.pgm').image[0, :, 0].tolist() == [255, 255, 136]


def jpeg2000(image, *bits):
    """A lossless file with `bits` per channel: one of 16, with the depths in its header replaced."""
    offset = (32768 - 2 ** (np.array(bits) - 1)).astype(np.uint16)
    pixels, parameters = (image + offset)[..., ::-1], [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    content = bytearray(cv2.imencode('.jp2', pixels, parameters)[1])
    channels = content.find(b'\xff\x4f\xff\x51') + 42
    content[channels : channels + 3 * len(bits) : 3] = bytes(depth - 1 for depth in bits)
    content[content.find(b'ihdr') + 14] = bits[0] - 1 if len(set(bits)) == 1 else 255
    return bytes(content)


@READERS
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('bits', [9, 10, 12, 14, 16])
def test_jpeg_2000_of_every_depth_fills_the_range(bits, channels, read, tmp_path):
    image = ramp(2**bits - 1, channels)
    (tmp_path / 'a.jp2').write_bytes(jpeg2000(image, *[bits] * channels))
    result = read(tmp_path / 'a.jp2')
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result, full(image, 2**bits - 1))


@READERS
def test_jpeg_2000_of_several_depths_is_refused(read, tmp_path):
    (tmp_path / 'a.jp2').write_bytes(jpeg2000(ramp(255, 3, np.uint16), 16, 10, 12))
    with pytest.raises(ValueError, match='channels of different bits$'):
        read(tmp_path / 'a.jp2')


def packed_tiff(image, bits, photometric):
    """A file with packed channels of `bits`; rows must end at whole bytes."""
    text = ''.join(f'{value:0{bits}b}' for value in image.ravel().tolist())
    data = image.tobytes() if bits == 16 else int(text, 2).to_bytes(len(text) // 8, 'big')
    height, width, channels = image.shape
    shorts = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric], 277: [channels]}
    ifd = {number: Tag(3, struct.pack(f'<{len(values)}H', *values)) for number, values in shorts.items()}
    ifd |= {
        273: Tag(4, struct.pack('<I', 8)),
        278: Tag(4, struct.pack('<I', height)),
        279: Tag(4, struct.pack('<I', len(data))),
    }
    return b'II*\0' + struct.pack('<I', 8 + len(data)) + data + write_ifd(ifd, 8 + len(data))


@READERS
@pytest.mark.parametrize('photometric', [0, 1, 2])
@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_tiff_of_every_depth_fills_the_range_or_is_refused(bits, photometric, read, tmp_path):
    white = 2**bits - 1
    image = ramp(white, 3 if photometric == 2 else 1)
    (tmp_path / 'a.tif').write_bytes(packed_tiff(white - image if photometric == 0 else image, bits, photometric))
    if bits in (10, 14) or (bits == 12 and photometric != 1):
        with pytest.raises(ValueError, match='truncated'):
            read(tmp_path / 'a.tif')
        return
    result = read(tmp_path / 'a.tif')
    assert result.dtype == (np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_array_equal(result, full(image, white))


@READERS
@pytest.mark.parametrize('compression', [None, 'deflate'])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_tiff_of_separate_channels_is_right_or_refused(dtype, compression, read, tmp_path):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (6, 8, 3), dtype, endpoint=True)
    planes = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    options = {'planarconfig': 'separate', 'compression': compression}
    tifffile.imwrite(tmp_path / 'a.tif', planes, photometric='rgb', metadata=None, **options)
    if dtype == np.uint8:
        np.testing.assert_array_equal(read(tmp_path / 'a.tif'), image)
    else:
        with pytest.raises(ValueError, match='is a TIFF file of separate channels with more than 8 bits'):
            read(tmp_path / 'a.tif')


@pytest.mark.parametrize(('name', 'white'), [('a.pgm', 1023), ('a.png', 65535), ('a.png', 255)])
def test_pages_show_the_full_range(name, white, tmp_path):
    image = ramp(white, 1)
    if name == 'a.pgm':
        (tmp_path / name).write_bytes(b'P5 64 64 1023\n' + image.astype('>u2').tobytes())
    else:
        cv2.imwrite(str(tmp_path / name), image)
    expected = np.round(image / white * 255)
    np.testing.assert_allclose(by_pages(tmp_path / name), np.repeat(expected, 3, 2), atol=1)


@READERS
@pytest.mark.parametrize('alpha', ['unassalpha', 'assocalpha'])
def test_tiff_with_alpha_keeps_its_colours(alpha, read, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    pixels[..., 3] |= 128
    stored = pixels.copy()
    if alpha == 'assocalpha':
        stored[..., :3] = np.round(pixels[..., :3] * (pixels[..., 3:] / 255))
    tifffile.imwrite(tmp_path / 'a.tif', stored, photometric='rgb', extrasamples=[alpha])
    difference = np.abs(np.int32(read(tmp_path / 'a.tif')) - pixels[..., :3])
    assert difference.max() <= (2 if alpha == 'assocalpha' else 0)


def test_a_later_page_of_separate_channels_is_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / 'a.tif') as file:
        file.write(np.zeros((6, 8), np.uint16), photometric='minisblack')
        file.write(np.zeros((3, 6, 8), np.uint16), photometric='rgb', planarconfig='separate')
    with pytest.raises(ValueError, match='is a TIFF file of separate channels with more than 8 bits'):
        read_pictures(tmp_path / 'a.tif')


@READERS
@pytest.mark.parametrize(
    ('masks', 'bits'), [((), (5, 5, 5)), ((0x7C00, 0x3E0, 0x1F), (5, 5, 5)), ((0xF800, 0x7E0, 0x1F), (5, 6, 5))]
)
def test_bmp_of_16_bits_fills_the_range(masks, bits, read, tmp_path):
    values = [np.linspace(0, 2**depth - 1, 64).round().astype(int) for depth in bits]
    red, green, blue = values[0], values[1][::-1], values[2]
    data = (red << (bits[1] + 5) | green << 5 | blue).astype('<u2').tobytes()
    header = struct.pack('<IiiHHIIiiII', 40, 64, 1, 1, 16, 3 if masks else 0, len(data), 0, 0, 0, 0)
    header += struct.pack(f'<{len(masks)}I', *masks)
    (tmp_path / 'a.bmp').write_bytes(b'BM' + struct.pack('<IHHI', 0, 0, 0, 14 + len(header)) + header + data)
    expected = np.stack([red * 255 / 31, green * 255 / (2 ** bits[1] - 1), blue * 255 / 31], 1).round()
    np.testing.assert_array_equal(read(tmp_path / 'a.bmp')[0], expected)


@READERS
@pytest.mark.parametrize('name', ['a.ras', 'a.sr'])
def test_a_grey_sun_raster_that_we_write_is_lossless(name, read, tmp_path):
    image = ramp(255, 1)
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    picture = read_picture(tmp_path / 'a.png')
    assert write_picture(tmp_path / name, picture) == [] and picture.grey
    np.testing.assert_array_equal(read(tmp_path / name), full(image, 255))
    assert read_picture(tmp_path / name).grey


@READERS
@pytest.mark.parametrize(
    ('depth', 'palette', 'data', 'expected'),
    [
        (8, b'', b'\0\x32\xc8\xff', [[0] * 3, [50] * 3, [200] * 3, [255] * 3]),
        (1, b'', b'\x60\0', [[255] * 3, [0] * 3, [0] * 3, [255] * 3]),  # 1 is black
        (8, b'\x0a\x14\x1e\x28\x32\x3c', b'\0\1\1\0', [[10, 30, 50], [20, 40, 60], [20, 40, 60], [10, 30, 50]]),
        (24, b'', bytes(range(12)), [[2, 1, 0], [5, 4, 3], [8, 7, 6], [11, 10, 9]]),
    ],
)
def test_sun_rasters_have_their_colours(depth, palette, data, expected, read, tmp_path):
    header = struct.pack('>IIIIIIII', 0x59A66A95, 4, 1, depth, len(data), 1, bool(palette), len(palette))
    (tmp_path / 'a.ras').write_bytes(header + palette + data)
    assert read(tmp_path / 'a.ras')[0].tolist() == expected


def test_a_damaged_sun_raster_is_refused(tmp_path):
    (tmp_path / 'a.ras').write_bytes(struct.pack('>IIIIII', 0x59A66A95, 4, 1, 8, 4, 1))
    with pytest.raises(ValueError, match='truncated'):
        read_picture(tmp_path / 'a.ras')


@READERS
@pytest.mark.parametrize('orientation', range(1, 9))
def test_avif_is_turned_upright(orientation, read, tmp_path):
    """Pillow writes the orientation as properties of the picture, and not into the EXIF data."""
    exif = Image.Exif()
    exif[274], exif[0x010E] = orientation, 'described'
    exif.get_ifd(0x8769).update({0xA002: 64, 0xA003: 48})
    Image.fromarray(ramp(255, 3)[:48]).save(tmp_path / 'a.avif', quality=100, exif=exif)
    with Image.open(tmp_path / 'a.avif') as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
        assert image.getexif().get(274, 1) == orientation
    np.testing.assert_array_equal(read(tmp_path / 'a.avif'), expected)
    write_picture(tmp_path / 'b.avif', read_picture(tmp_path / 'a.avif'))
    with Image.open(tmp_path / 'b.avif') as image:
        assert image.getexif().get(274, 1) == 1 and image.getexif()[0x010E] == 'described'
        assert image.info['exif'].startswith(b'MM\0*'), 'no prefix, which only JPEG files have'
        sizes = image.getexif().get_ifd(0x8769)
        assert image.size == expected.shape[1::-1] == (sizes[0xA002], sizes[0xA003])


@READERS
@pytest.mark.parametrize('turned', [True, False])
def test_exif_data_of_avif_does_not_turn_it(turned, read, tmp_path):
    """OpenCV writes the orientation of EXIF data twice, of which HEIF makes readers ignore that in EXIF data."""
    exif, image = Image.Exif(), ramp(255, 3)[:48]
    exif[274] = 6
    parts = [cv2.IMAGE_METADATA_EXIF], [np.frombuffer(exif.tobytes()[6:], np.uint8)]
    parameters = [cv2.IMWRITE_AVIF_QUALITY, 100]
    content = cv2.imencodeWithMetadata('.avif', image[..., ::-1], *parts, parameters)[1].tobytes()
    assert content.count(b'irot\3') == 1
    (tmp_path / 'a.avif').write_bytes(content if turned else content.replace(b'irot\3', b'irot\0'))
    np.testing.assert_array_equal(read(tmp_path / 'a.avif'), np.rot90(image, -1) if turned else image)
    picture = read_picture(tmp_path / 'a.avif')
    assert Exif(picture.data(cv2.IMAGE_METADATA_EXIF)).upright() == 1


@READERS
def test_a_tiff_tag_that_points_beyond_every_file_is_ignored(read, tmp_path):
    image = ramp(255, 3)
    content = tiff.encode([(image[..., ::-1], {0x8769: Tag(16, struct.pack('<Q', 2**63))})])
    (tmp_path / 'a.tif').write_bytes(content)
    np.testing.assert_array_equal(read(tmp_path / 'a.tif'), image)
