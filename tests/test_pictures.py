"""Image files of all kinds, as users have them: what is kept, what is refused, and what the command reports."""

import errno
import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps, ImageSequence, PngImagePlugin
from support.commands import PACKAGE_PARENT, run, warm_python

import dpmambair_basicsr
from dpmambair_basicsr import restore as command
from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.files import pictures, tiff
from dpmambair_basicsr.files.containers import Resolution, png_chunk
from dpmambair_basicsr.files.ifd import Tag
from dpmambair_basicsr.files.pictures import (
    read_picture,
    read_pictures,
    restored_picture,
    write_picture,
    write_pictures,
)
from dpmambair_basicsr.inference import restorer
from dpmambair_basicsr.inference.memory import OutOfMemory
from dpmambair_basicsr.inference.restorer import Restorer

dpmambair_basicsr.register()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
NETWORK = {'type': 'VmambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def smooth(height, width, seed=0):
    small = noise(4, 5, 3, seed=seed)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def small_network(**changes):
    torch.manual_seed(0)
    return VmambaIR(**{key: value for key, value in (NETWORK | changes).items() if key != 'type'})


@pytest.fixture(scope='module')
def identity(tmp_path_factory):
    """Weights of a network that returns its input."""
    net = small_network()
    torch.nn.init.zeros_(net.output.weight)
    file = tmp_path_factory.mktemp('weights') / 'identity.pth'
    torch.save({'params': net.state_dict(), 'network_g': NETWORK}, file)
    return file


@dataclass
class Done:
    """The outcome of a command, as of one in its own process."""

    returncode: int
    stdout: str


def restore(identity, *arguments, cwd):
    """The command, in this process."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.chdir(cwd)
        patch.setattr('sys.argv', ['restore', '-w', *map(str, (identity, *arguments))])
        try:
            status = command.main()
        except SystemExit as ended:
            status = ended.code
    if isinstance(status, str):
        return Done(1, f'{output.getvalue()}{status}\n')
    return Done(status, output.getvalue())


def again(path, target=None):
    """Reads the picture at path, and writes it."""
    picture = read_picture(path)
    return write_picture(target or path, picture)


# Metadata


@pytest.mark.parametrize('byteorder', ['<', '>'])
@pytest.mark.parametrize('shape', [(9, 7), (9, 7, 3), (9, 7, 4)])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_tiff_keeps_profile_resolution_description_dates_and_alpha(byteorder, shape, dtype, tmp_path):
    pixels, path = noise(*shape, dtype=dtype), tmp_path / 'a.tif'
    profile = SRGB if len(shape) == 3 else SRGB[:16] + b'GRAY' + SRGB[20:]
    said = {
        270: 'Stra\xdfe'.encode(),
        271: b'Maker',
        315: b'An artist',
        306: b'2020:01:02 03:04:05',
        33432: '\xa9 wir'.encode(),
    }
    tifffile.imwrite(
        path,
        pixels,
        byteorder=byteorder,
        photometric='rgb' if len(shape) == 3 else 'minisblack',
        extrasamples=['unassalpha'] if shape[-1] == 4 else None,
        iccprofile=profile,
        resolution=(300.5, 150),
        resolutionunit='CENTIMETER',
        metadata=None,
        extratags=[(tag, 2, 0, text, True) for tag, text in said.items()] + [(700, 1, 4, b'<x/>', True)],
    )
    assert again(path) == []
    with tifffile.TiffFile(path) as file:
        (page,) = file.pages
        tags = {tag.code: tag for tag in page.tags}
        for number, text in said.items():
            file.filehandle.seek(tags[number].valueoffset)
            assert file.filehandle.read(len(text)) == text
        assert page.iccprofile == profile and tags[700].value == b'<x/>'
        assert [a / b for a, b in (tags[282].value, tags[283].value)] == [300.5, 150] and tags[296].value == 3
        assert list(page.extrasamples) == ([2] if shape[-1] == 4 else [])
    with Image.open(path) as image:
        assert image.mode == {2: {'uint8': 'L', 'uint16': 'I;16'}, 3: {'uint8': 'RGB', 'uint16': 'RGB'}}[len(shape)][
            pixels.dtype.name
        ] + 'A' * (shape[-1] == 4)
    again(path)  # reading the result gives the same values
    picture = read_picture(path)
    expected = np.repeat(pixels[..., None], 3, 2) if len(shape) == 2 else pixels[..., :3]
    np.testing.assert_array_equal(picture.image, expected)
    if shape[-1] == 4:
        np.testing.assert_array_equal(picture.alpha, pixels[..., 3])


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_tiff_is_turned_upright(orientation, dtype, tmp_path):
    path, pixels = tmp_path / 'a.tif', noise(5, 9, 3, dtype=dtype)
    tifffile.imwrite(path, pixels, photometric='rgb', extratags=[(274, 3, 1, orientation, True)])
    exif = Image.Exif()
    exif[274] = orientation
    small = Image.fromarray((pixels >> (8 * (pixels.itemsize - 1))).astype(np.uint8))
    small.info['exif'] = exif.tobytes()
    again(path)
    with tifffile.TiffFile(path) as file:
        assert 274 not in file.pages[0].tags
    np.testing.assert_array_equal(
        read_picture(path).image >> (8 * (pixels.itemsize - 1)), np.asarray(ImageOps.exif_transpose(small))
    )


def test_tiff_keeps_exif_and_gps_data(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = 'Maker'
    exif.get_ifd(0x8769).update({0x9003: '2020:01:02 03:04:05', 0x829A: 0.25, 0x9286: b'ASCII\0\0\0text'})
    exif.get_ifd(0x8825).update({1: 'N', 2: (48.0, 8.0, 30.5)})
    (tmp_path / 'a.png').write_bytes(encoded(Image.fromarray(noise(6, 8, 3)), 'png', exif=exif))
    for before, after in ('a.png', 'b.tif'), ('b.tif', 'c.tif'), ('c.tif', 'd.png'):
        assert again(tmp_path / before, tmp_path / after) == []
    for name in 'b.tif', 'c.tif', 'd.png':
        with Image.open(tmp_path / name) as image:
            found = image.getexif()
            assert found[0x010F] == 'Maker'
            assert found.get_ifd(0x8769) == exif.get_ifd(0x8769) and found.get_ifd(0x8825) == exif.get_ifd(0x8825)


def test_unusual_tiff_files_have_right_colours_or_are_refused(tmp_path):
    path = tmp_path / 'a.tif'

    def read(pixels, **options):
        tifffile.imwrite(path, pixels, **options)
        return read_picture(path)

    grey = noise(6, 8, dtype=np.uint16)
    np.testing.assert_array_equal(read(grey, photometric='miniswhite').image[..., 0], 65535 - grey)
    two = read(noise(6, 8, 2), photometric='minisblack', extrasamples='unassalpha', planarconfig='contig')
    np.testing.assert_array_equal(np.dstack([two.image[..., 0], two.alpha]), noise(6, 8, 2))
    for dtype, close in ((np.uint8, 3), (np.uint16, 1)):  # colours multiplied by alpha
        top = np.iinfo(dtype).max
        alpha, colours = noise(6, 8, 1, dtype=dtype) // 2 + top // 2, noise(6, 8, 3, dtype=dtype, seed=1)
        multiplied = (colours.astype(np.float64) * alpha / top).round().astype(dtype)
        image = read(np.dstack([multiplied, alpha]), photometric='rgb', extrasamples='assocalpha').image
        np.testing.assert_allclose(image.astype(int), colours, atol=close)
    cmyk = noise(6, 8, 4)
    picture = read(cmyk, photometric='separated', iccprofile=SRGB[:16] + b'CMYK' + SRGB[20:])
    np.testing.assert_array_equal(picture.image, np.asarray(Image.fromarray(cmyk, 'CMYK').convert('RGB')))
    assert write_picture(tmp_path / 'b.tif', picture) == ['CMYK and its colour profile']
    with pytest.raises(ValueError, match='is 16-bit CMYK'):
        read(noise(6, 8, 4, dtype=np.uint16), photometric='separated')
    with pytest.raises(ValueError, match='is 16-bit grey with alpha'):
        read(
            noise(6, 8, 2, dtype=np.uint16), photometric='minisblack', extrasamples='unassalpha', planarconfig='contig'
        )
    with pytest.raises(ValueError, match='has 5 channels'):
        read(noise(6, 8, 5), photometric='rgb', extrasamples=['unassalpha', 'unspecified'])


def test_png_keeps_resolution_text_time_and_colours(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text('Title', 'a title')
    text.add_text('Comment', 'long ' * 99, zip=True)
    text.add_itxt('Author', '\xc4nne', lang='de')
    text.add(b'gAMA', struct.pack('>I', 45455))
    text.add(b'tIME', struct.pack('>HBBBBB', 2020, 1, 2, 3, 4, 5))
    path = tmp_path / 'a.png'
    path.write_bytes(encoded(Image.fromarray(noise(6, 8, 3)), 'png', pnginfo=text, dpi=(300, 200)))
    assert again(path, tmp_path / 'b.png') == []
    with Image.open(path) as before, Image.open(tmp_path / 'b.png') as after:
        before.load(), after.load()
        assert after.text == before.text and len(after.text) == 3
        assert after.info['dpi'] == before.info['dpi'] and after.info['gamma'] == before.info['gamma']
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    assert b'tIME' in (tmp_path / 'b.png').read_bytes()
    assert again(path, tmp_path / 'c.jpg') == ['text and colour chunks']
    with Image.open(tmp_path / 'c.jpg') as image:
        assert image.info['dpi'] == (300, 200)


RATIO = struct.pack('<II', 300, 1)


@pytest.mark.parametrize('target', ['b.tif', 'b.png', 'b.jpg', 'b.bmp'])
@pytest.mark.parametrize(
    ('kind', 'value', 'unit', 'dpi'),
    [
        (5, RATIO, b'', 300),  # the default unit is the inch
        (5, RATIO, None, 300),
        (5, RATIO, b'\2\0', 300),
        (12, struct.pack('<d', np.inf), b'\2\0', None),
        (12, struct.pack('<d', np.nan), b'\2\0', None),
        (5, struct.pack('<II', 2**32 - 1, 1), b'\2\0', None),
        (5, struct.pack('<II', 300, 0), b'\2\0', None),
        (5, b'', b'\2\0', None),
    ],
)
def test_meaningless_resolutions_are_ignored(kind, value, unit, dpi, target, tmp_path):
    tags = {282: Tag(kind, value), 283: Tag(kind, value)} | ({} if unit is None else {296: Tag(3, unit)})
    (tmp_path / 'a.tif').write_bytes(tiff.encode([(noise(6, 8, 3), tags)]))
    picture = read_picture(tmp_path / 'a.tif')
    assert picture.extras.resolution == (None if dpi is None else Resolution(dpi, dpi, 0.0254))
    write_picture(tmp_path / target, picture)
    read_picture(tmp_path / target)
    if dpi is not None:
        with Image.open(tmp_path / target) as image:
            assert [round(part) for part in image.info['dpi']] == [dpi, dpi]


def test_a_resolution_of_a_png_beyond_its_limit_is_ignored(tmp_path):
    content = encoded(Image.fromarray(noise(6, 8, 3)), 'png', dpi=(300, 300))
    for x in (0, 2**32 - 1):
        chunk = png_chunk(b'pHYs', struct.pack('>IIB', x, x, 1))
        place = content.index(b'pHYs') - 4
        (tmp_path / 'a.png').write_bytes(content[:place] + chunk + content[place + len(chunk) :])
        assert again(tmp_path / 'a.png', tmp_path / 'b.bmp') == []
        assert read_picture(tmp_path / 'b.bmp').extras.resolution is None


def test_exif_data_that_is_text_in_a_png_is_exif_data_once(tmp_path):
    """As ImageMagick writes it; its orientation would rotate the result a second time."""
    exif = Image.Exif()
    exif[274], exif[0x010E] = 6, 'described'
    data = exif.tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text('Raw profile type exif', f'\nexif\n{len(data):8}\n{data.hex()}\n')
    path = tmp_path / 'a.png'
    path.write_bytes(encoded(Image.fromarray(noise(6, 8, 3)), 'png', pnginfo=text))
    again(path)
    with Image.open(path) as image:
        assert image.size == (6, 8) and 'Raw profile type exif' not in image.text
        assert image.getexif()[0x010E] == 'described' and image.getexif()[274] == 1


def test_jpeg_keeps_resolution_comment_and_captions_but_no_old_thumbnail(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = 'described'
    thumbnail = encoded(Image.fromarray(noise(4, 4, 3)), 'jpeg')
    ifd1 = {0x0103: 6, 0x0201: 0, 0x0202: len(thumbnail)}
    block = exif.tobytes() + b''
    # A second list, with the thumbnail behind it, as cameras write it.
    data = bytearray(block[6:])
    order = '<' if data[:2] == b'II' else '>'
    (first,) = struct.unpack_from(f'{order}I', data, 4)
    (entries,) = struct.unpack_from(f'{order}H', data, first)
    data += bytes(len(data) % 2)
    struct.pack_into(f'{order}I', data, first + 2 + 12 * entries, len(data))
    ifd1[0x0201] = len(data) + 2 + 12 * 3 + 4
    data += struct.pack(f'{order}H', 3)
    data += b''.join(struct.pack(f'{order}HHII', tag, 4, 1, value) for tag, value in ifd1.items())
    data += struct.pack(f'{order}I', 0) + thumbnail
    caption = b'8BIM\x04\x04\0\0' + struct.pack('>I', 8) + b'\x1c\x02x\0\x03abc'
    resource = b'8BIM\x04\x0c\0\0' + struct.pack('>I', len(thumbnail)) + thumbnail + bytes(len(thumbnail) % 2)
    photoshop = b'Photoshop 3.0\0' + resource + caption
    segment = b'\xff\xed' + struct.pack('>H', len(photoshop) + 2) + photoshop
    content = encoded(
        Image.fromarray(smooth(24, 32)),
        'jpeg',
        quality=95,
        dpi=(300, 300),
        comment=b'a comment',
        exif=b'Exif\0\0' + data,
    )
    path = tmp_path / 'a.jpg'
    path.write_bytes(content[:20] + segment + content[20:])
    assert thumbnail in path.read_bytes()
    assert again(path, tmp_path / 'b.jpg') == []
    after = (tmp_path / 'b.jpg').read_bytes()
    with Image.open(tmp_path / 'b.jpg') as image:
        assert image.info['dpi'] == (300, 300) and image.info['comment'] == b'a comment'
        assert image.getexif()[0x010E] == 'described' and not image.getexif().get_ifd(1)
    assert caption in after and thumbnail not in after


def test_exif_data_has_the_size_of_the_result(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    exif.get_ifd(0x8769).update({0xA002: 32, 0xA003: 24})
    (tmp_path / 'a.jpg').write_bytes(encoded(Image.fromarray(smooth(24, 32)), 'jpeg', exif=exif))
    again(tmp_path / 'a.jpg', tmp_path / 'a.tif')
    for name in 'a.jpg', 'a.tif':
        picture = read_picture(tmp_path / name)
        write_picture(tmp_path / name, restored_picture(picture, picture.image.repeat(2, 0).repeat(2, 1)))
        with Image.open(tmp_path / name) as image:
            sizes = image.getexif().get_ifd(0x8769)
            assert image.size == (sizes[0xA002], sizes[0xA003]) == (48, 64), name


def test_xmp_has_the_orientation_and_thumbnail_of_the_result(tmp_path):
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:title="t">'
        b'<xmp:Thumbnails><rdf:Alt>AAAA</rdf:Alt></xmp:Thumbnails></rdf:Description></x:xmpmeta>'
    )
    path = tmp_path / 'a.jpg'
    path.write_bytes(encoded(Image.fromarray(smooth(24, 32)), 'jpeg', xmp=xmp))
    again(path)
    with Image.open(path) as image:
        assert b'tiff:Orientation="1" dc:title="t"></rdf' in image.info['xmp']


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.tif', 'a.webp', 'a.avif'])
def test_every_format_for_photographs_keeps_the_profile(name, tmp_path):
    path = tmp_path / name
    Image.fromarray(smooth(24, 32)).save(path, icc_profile=SRGB)
    assert again(path) == []
    with Image.open(path) as image:
        assert image.info['icc_profile'] == SRGB


def test_data_that_a_format_cannot_store_is_named(tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(encoded(Image.fromarray(smooth(64, 64)), 'png', icc_profile=SRGB, dpi=(300, 300)))
    assert again(path, tmp_path / 'a.ppm') == ['colour profile', 'resolution']
    assert again(path, tmp_path / 'a.bmp') == ['colour profile']
    assert again(path, tmp_path / 'a.jp2') == ['colour profile', 'resolution']
    assert again(path, tmp_path / 'a.webp') == ['resolution']


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.bmp', 'a.webp', 'a.avif', 'a.jp2', 'a.ppm', 'a.sr'])
def test_all_formats_but_jpeg_are_lossless(name, tmp_path):
    pixels = smooth(37, 45)
    cv2.imwrite(str(tmp_path / 'source.png'), pixels)
    again(tmp_path / 'source.png', tmp_path / name)
    np.testing.assert_array_equal(read_picture(tmp_path / name).image, pixels[..., ::-1])


@pytest.mark.parametrize('name', ['a.jpe', 'a.jfif', 'a.JPG'])
def test_all_extensions_of_jpeg_have_its_quality(name, tmp_path):
    cv2.imwrite(str(tmp_path / 'source.png'), smooth(37, 45))
    again(tmp_path / 'source.png', tmp_path / name)
    again(tmp_path / 'source.png', tmp_path / 'a.jpeg')
    assert (tmp_path / name).read_bytes() == (tmp_path / 'a.jpeg').read_bytes()


@pytest.mark.parametrize(('name', 'parameters'), [('a.png', []), ('a.jpg', [1, 98, 7, 0x111111])])
def test_files_without_metadata_are_byte_identical_to_opencvs(name, parameters, tmp_path):
    """So results are the same as before metadata was kept."""
    path = tmp_path / name
    cv2.imwrite(str(path), smooth(37, 45))
    pixels = cv2.imread(str(path))
    again(path)
    assert path.read_bytes() == cv2.imencode(path.suffix, pixels, parameters)[1].tobytes()


# Transparency


@pytest.mark.parametrize('name', ['a.png', 'a.webp', 'a.tif'])
def test_hidden_colours_do_not_bleed_into_visible_edges(name, tmp_path):
    """A red disc with a soft edge over hidden green, by a network with a receptive field around each pixel."""
    y, x = np.mgrid[:64, :64] - 31.5
    alpha = (255 * np.clip(24 - np.hypot(x, y), 0, 3) / 3).astype(np.uint8)
    colours = np.where(alpha[..., None] > 0, np.uint8([220, 30, 20]), np.uint8([0, 255, 0])).astype(np.uint8)
    Image.fromarray(np.dstack([colours, alpha])).save(
        tmp_path / name, **({'lossless': True, 'exact': True} if 'webp' in name else {})
    )

    class Blur(torch.nn.Module):
        def forward(self, image):
            return torch.nn.functional.avg_pool2d(image, 9, 1, 4, count_include_pad=False)

    net = Restorer(Blur(), torch.device('cpu'))
    picture = read_picture(tmp_path / name)
    write_picture(tmp_path / name, restored_picture(picture, net.restore(picture.visible_image())))
    result = read_picture(tmp_path / name)
    np.testing.assert_array_equal(result.alpha, alpha)
    seen = result.image[alpha > 0].astype(int)
    assert np.abs(seen - [220, 30, 20]).max() <= 1
    assert np.abs(net.restore(picture.image)[alpha > 0].astype(int) - [220, 30, 20]).max() > 40, (
        'otherwise it shows nothing'
    )
    np.testing.assert_array_equal(result.image[alpha == 0], colours[alpha == 0])


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
def test_the_transparent_shade_of_a_grey_png_is_kept_as_alpha(bits, tmp_path):
    white, rows = 2**bits - 1, np.arange(256).reshape(16, 16) % 2**bits
    packed = ''.join(f'{value:0{bits}b}' for value in rows.ravel())
    width = len(packed) // 8 // 16
    data = int(packed, 2).to_bytes(width * 16, 'big')
    header = struct.pack('>IIBBBBB', 16, 16, bits, 0, 0, 0, 0)
    idat = zlib.compress(b''.join(b'\0' + data[at : at + width] for at in range(0, len(data), width)))
    shade = min(7, white)
    chunks = {b'IHDR': header, b'tRNS': struct.pack('>H', shade), b'IDAT': idat, b'IEND': b''}
    content = b'\x89PNG\r\n\x1a\n' + b''.join(png_chunk(name, part) for name, part in chunks.items())
    (tmp_path / 'a.png').write_bytes(content)
    picture = read_picture(tmp_path / 'a.png')
    top = 65535 if bits == 16 else 255
    np.testing.assert_array_equal(picture.image, np.repeat((rows * (top // white))[..., None], 3, 2))
    np.testing.assert_array_equal(picture.alpha, np.where(rows == shade, 0, top))
    for name in 'b.png', 'b.tif':
        assert write_picture(tmp_path / name, picture) == []
        after = read_picture(tmp_path / name)
        np.testing.assert_array_equal(np.dstack([after.image, after.alpha]), np.dstack([picture.image, picture.alpha]))
    with pytest.raises(ValueError, match='does not support its alpha channel'):
        write_picture(tmp_path / 'b.bmp', picture)


def test_a_fully_transparent_picture_is_left_unchanged(tmp_path):
    pixels = np.dstack([noise(6, 8, 3), np.zeros((6, 8), np.uint8)])
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    np.testing.assert_array_equal(read_picture(tmp_path / 'a.png').visible_image(), pixels[..., :3])


# Animations and pages


def frames(alpha=False, number=3):
    images = [smooth(24, 32, seed) for seed in range(number)]
    if alpha:
        images = [np.dstack([image, noise(24, 32, seed=9 + seed)]) for seed, image in enumerate(images)]
    return [Image.fromarray(image) for image in images]


@pytest.mark.parametrize('alpha', [False, True])
@pytest.mark.parametrize(('name', 'options'), [('a.png', {}), ('a.webp', {'lossless': True, 'exact': True})])
def test_animations_keep_every_frame_and_their_timing(name, options, alpha, tmp_path):
    first, *rest = frames(alpha)
    durations = [100, 250, 40]
    first.save(
        tmp_path / name,
        save_all=True,
        append_images=rest,
        duration=durations,
        loop=2,
        icc_profile=SRGB,
        **options,
    )
    found, timing = read_pictures(tmp_path / name)
    assert len(found) == 3 and timing.durations == tuple(durations) and timing.loop == 2
    inverted = [restored_picture(picture, 255 - picture.image) for picture in found]
    assert write_pictures(tmp_path / f'b{name}', inverted, timing) == []
    with Image.open(tmp_path / f'b{name}') as image:
        assert image.n_frames == 3 and image.info['loop'] == 2 and image.info['icc_profile'] == SRGB
        after = [(frame.convert('RGBA'), frame.info['duration']) for frame in ImageSequence.Iterator(image)]
    assert [duration for _, duration in after] == durations
    for (frame, _), before in zip(after, frames(alpha), strict=True):
        before = np.asarray(before.convert('RGBA'))
        seen = before[..., 3] > 0
        np.testing.assert_array_equal(np.asarray(frame)[seen][:, :3], 255 - before[seen][:, :3])
        np.testing.assert_array_equal(np.asarray(frame)[..., 3], before[..., 3])


@pytest.mark.parametrize('number', [2, 4])
def test_delays_after_a_default_image_belong_to_the_same_frames(number, tmp_path):
    first, *rest = frames(number=number)
    durations = [100, 250, 40][: number - 1]
    options = {'save_all': True, 'append_images': rest, 'default_image': True, 'duration': durations}
    first.save(tmp_path / 'a.png', **options)
    found, timing = read_pictures(tmp_path / 'a.png')
    assert write_pictures(tmp_path / 'b.png', found, timing) == []
    for name in 'a.png', 'b.png':
        with Image.open(tmp_path / name) as image:
            assert image.info['default_image'] and image.n_frames == number
            shown = [(np.asarray(frame), frame.info.get('duration')) for frame in ImageSequence.Iterator(image)]
        assert [duration for _, duration in shown[1:]] == durations, name
        for (pixels, _), frame in zip(shown, [first, *rest], strict=True):
            np.testing.assert_array_equal(pixels, np.asarray(frame))
    assert write_pictures(tmp_path / 'b.webp', found, timing) == []
    with Image.open(tmp_path / 'b.webp') as image:
        assert getattr(image, 'n_frames', 1) == number - 1, 'programs that show WebP show its animations'
        np.testing.assert_array_equal(np.asarray(image), np.asarray(rest[0]))


@pytest.mark.parametrize('target', ['b.png', 'b.webp'])
@pytest.mark.parametrize('name', ['a.png', 'a.gif'])
def test_grey_animations_with_a_transparent_shade_keep_it(name, target, tmp_path):
    shades = np.arange(256, dtype=np.uint8).reshape(16, 16)
    shades = [shades, shades.T, 255 - shades]
    first, *rest = (Image.fromarray(np.ascontiguousarray(image)) for image in shades)
    options = {'disposal': 2} if name == 'a.gif' else {}
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=[50, 70, 90], transparency=7, **options)
    found, timing = read_pictures(tmp_path / name)
    assert not any(picture.grey for picture in found) and timing.durations == (50, 70, 90)
    assert write_pictures(tmp_path / target, found, timing) == []
    with Image.open(tmp_path / target) as image:
        for frame, before in zip(ImageSequence.Iterator(image), shades, strict=True):
            after = np.asarray(frame.convert('RGBA'))
            np.testing.assert_array_equal(after[..., 3], np.where(before == 7, 0, 255))
            np.testing.assert_array_equal(after[before != 7][:, :3], np.repeat(before[before != 7][:, None], 3, 1))


@pytest.mark.parametrize('disposal', [0, 1, 2])
def test_grey_gifs_of_changing_parts_have_right_frames(disposal, tmp_path):
    frames = [np.arange(256, dtype=np.uint8).reshape(16, 16)]  # all shades: their palette is the identity
    for seed in range(3):
        frames.append(frames[-1].copy())
        frames[-1][4 * seed : 4 * seed + 6, 5:9] = noise(6, 4, seed=seed)
    first, *rest = map(Image.fromarray, frames)
    options = {'duration': [10, 20, 30, 40], 'disposal': disposal, 'loop': 3}
    first.save(tmp_path / 'a.gif', save_all=True, append_images=rest, **options)
    found, timing = read_pictures(tmp_path / 'a.gif')
    assert timing.durations == (10, 20, 30, 40) and timing.loop == 3
    for picture, frame in zip(found, frames, strict=True):
        assert picture.grey
        np.testing.assert_array_equal(picture.image, np.repeat(frame[..., None], 3, 2))


def test_animations_with_grey_and_alpha_keep_both(tmp_path):
    pixels = [noise(24, 32, 2, seed=seed) for seed in range(3)]
    first, *rest = (Image.fromarray(image, 'LA') for image in pixels)
    first.save(tmp_path / 'a.png', save_all=True, append_images=rest, duration=100)
    found, timing = read_pictures(tmp_path / 'a.png')
    assert write_pictures(tmp_path / 'b.png', found, timing) == []
    with Image.open(tmp_path / 'b.png') as image:
        for frame, before in zip(ImageSequence.Iterator(image), pixels, strict=True):
            after, seen = np.asarray(frame.convert('RGBA')), before[..., 1] > 0
            np.testing.assert_array_equal(after[..., 3], before[..., 1])
            np.testing.assert_array_equal(after[seen][:, :3], np.repeat(before[seen][:, :1], 3, 1))


def test_a_gif_that_begins_grey_keeps_the_colours_of_later_frames(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    coloured = Image.fromarray(smooth(16, 16)).quantize(64)
    for name, second in ('colours.gif', coloured), ('grey.gif', grey.rotate(90)), ('palette.gif', grey.quantize(9)):
        grey.save(tmp_path / name, save_all=True, append_images=[second], duration=100)
        found, timing = read_pictures(tmp_path / name)
        assert write_pictures(tmp_path / 'a.png', found, timing) == []
        with Image.open(tmp_path / 'a.png') as image:
            assert image.mode == ('RGB' if name == 'colours.gif' else 'L')
            image.seek(1)
            np.testing.assert_array_equal(np.asarray(image.convert('RGB')), np.asarray(second.convert('RGB')))


def test_pages_keep_their_own_metadata(tmp_path):
    pages = [noise(6, 8, 3, dtype=np.uint16), noise(5, 4), noise(7, 3, 4, seed=2)]
    with tifffile.TiffWriter(tmp_path / 'a.tif') as file:
        for number, page in enumerate(pages):
            file.write(
                page,
                photometric='minisblack' if page.ndim == 2 else 'rgb',
                extrasamples=['unassalpha'] if page.ndim == 3 and page.shape[2] == 4 else None,
                description=f'page {number}',
                resolution=(100 + number, 100),
                metadata=None,
            )
    found, timing = read_pictures(tmp_path / 'a.tif')
    assert write_pictures(tmp_path / 'b.tif', found, timing) == []
    with tifffile.TiffFile(tmp_path / 'b.tif') as file:
        assert [page.description for page in file.pages] == ['page 0', 'page 1', 'page 2']
        assert [page.resolution[0] for page in file.pages] == [100, 101, 102]
        assert [(page.shape, page.dtype) for page in file.pages] == [(page.shape, page.dtype) for page in pages]
    for before, after in zip(found, read_pictures(tmp_path / 'b.tif')[0], strict=True):
        np.testing.assert_array_equal(before.image, after.image)
    np.testing.assert_array_equal(found[2].image, pages[2][..., :3])


def test_a_reduced_version_in_a_tiff_file_is_not_a_page(tmp_path):
    with tifffile.TiffWriter(tmp_path / 'a.tif') as file:
        file.write(noise(16, 16, 3), photometric='rgb')
        file.write(noise(4, 4, 3), photometric='rgb', subfiletype=1)
    picture = read_picture(tmp_path / 'a.tif')
    assert picture.image.shape == (16, 16, 3)
    assert write_picture(tmp_path / 'b.tif', picture) == ['smaller versions']


def test_the_command_restores_frames_or_refuses_with_one_line(identity, tmp_path):
    first, *rest = frames()
    for name in 'a.gif', 'a.png', 'a.webp':
        first.save(tmp_path / name, save_all=True, append_images=rest, duration=80, lossless=True)
    first.save(tmp_path / 'pages.tif', save_all=True, append_images=rest)
    done = restore(identity, 'a.gif', 'a.png', 'a.webp', 'pages.tif', '-o', 'out', cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[-1] == 'out: 3 restored, 1 failed', done.stdout
    assert 'a.gif: .gif cannot be written; use --ext png' in lines
    for name in 'a.png', 'a.webp', 'pages.tif':
        with Image.open(tmp_path / 'out' / name) as image:
            assert image.n_frames == 3
    done = restore(identity, 'a.gif', '--ext', 'png', '-o', 'gif.png', cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    with Image.open(tmp_path / 'a.gif') as before, Image.open(tmp_path / 'gif.png') as after:
        for a, b in zip(ImageSequence.Iterator(before), ImageSequence.Iterator(after), strict=True):
            np.testing.assert_array_equal(np.asarray(a.convert('RGB')), np.asarray(b.convert('RGB')))
            assert a.info['duration'] == b.info['duration']
    done = restore(identity, 'pages.tif', '--ext', 'png', '-o', 'out', cwd=tmp_path)
    assert done.returncode == 1 and 'pages.tif: .png does not support its 3 pages; use --ext tif' in done.stdout


# Tiles


def test_the_tile_depends_on_the_picture_alone(monkeypatch):
    """Neither on the free memory nor on the backend of the scans."""
    net = Restorer(small_network(), torch.device('cpu'))
    monkeypatch.setattr(restorer, 'BUDGET', net.bytes_per_pixel * 300**2)
    seen = set()
    for free in (10**8, 10**12):
        monkeypatch.setattr(restorer, 'free_memory', lambda device, free=free: free)
        seen.add((net.fitting_tile(3000, 2000), net.fitting_tile(300, 300), net.fitting_tile(10**5, 1)))
    assert seen == {(256, 0, 256)}
    for backend in ('reference', 'torch'):
        other = Restorer(small_network(), torch.device('cpu'), scan_backend=backend)
        assert other.bytes_per_pixel == net.bytes_per_pixel


def test_too_little_memory_is_reported_with_a_smaller_tile(monkeypatch):
    net = Restorer(small_network(), torch.device('cpu'))
    monkeypatch.setattr(restorer, 'free_memory', lambda device: 10**7)
    with pytest.raises(OutOfMemory, match=r'^300 x 260 pixels: out of memory; tile=150 \(--tile 150\) needs less'):
        net.restore(smooth(260, 300))
    assert net.restore(smooth(260, 300), tile=152, overlap=0, one_pass=True).shape == (260, 300, 3)


# The command: its inputs, outputs and messages


def test_results_have_the_requested_format(identity, tmp_path):
    Image.fromarray(noise(9, 8, 4)).save(tmp_path / 'alpha.tif')
    Image.fromarray(noise(9, 8, 4), 'CMYK').save(tmp_path / 'cmyk.tif')
    (tmp_path / 'png.jpg').write_bytes(encoded(Image.fromarray(noise(9, 8, 4)), 'png'))
    done = restore(identity, 'alpha.tif', 'cmyk.tif', 'png.jpg', '-o', 'out', cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert 'png.jpg: 8 x 9, ' in done.stdout and 'actually a png file, and so is the result' in done.stdout
    assert 'left out: CMYK and its colour profile' in done.stdout
    for name, kind, mode in (('alpha.tif', 'TIFF', 'RGBA'), ('cmyk.tif', 'TIFF', 'RGB'), ('png.jpg', 'PNG', 'RGBA')):
        with Image.open(tmp_path / 'out' / name) as image:
            assert (image.format, image.mode) == (kind, mode)
            if mode == 'RGBA':
                np.testing.assert_array_equal(np.asarray(image), noise(9, 8, 4))
    done = restore(identity, 'alpha.tif', 'png.jpg', '--ext', '.PNG', '-o', 'as_png', cwd=tmp_path)
    assert done.returncode == 0 and {file.name for file in (tmp_path / 'as_png').iterdir()} == {'alpha.png', 'png.png'}
    done = restore(identity, 'alpha.tif', '-o', 'new/one.webp', cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    with Image.open(tmp_path / 'new/one.webp') as image:
        assert image.format == 'WEBP' and image.mode == 'RGBA'


def test_subfolders_are_kept_and_other_files_counted(identity, tmp_path):
    for name in ('in/x.png', 'in/a/x.png', 'in/a/b/x.png', 'in/.hidden/x.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(9, 8, 3)).save(tmp_path / name)
    for name in ('a.heic', 'b.heic', 'notes.txt', 'a/c.heic'):
        (tmp_path / 'in' / name).write_bytes(b'')
    done = restore(identity, 'in', '-o', 'flat', cwd=tmp_path)
    assert done.returncode == 0 and [file.name for file in (tmp_path / 'flat').iterdir()] == ['x.png'], done.stdout
    said = 'skipped, unsupported format: 2 .heic, 1 .txt; 1 sub-folder not searched, which -r does'
    assert said in done.stdout.splitlines()
    done = restore(identity, 'in', '-r', '-o', 'in/out', cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert 'skipped, unsupported format: 3 .heic, 1 .txt' in done.stdout.splitlines()
    names = {'x.png', 'a/x.png', 'a/b/x.png'}
    assert {str(file.relative_to(tmp_path / 'in/out')) for file in (tmp_path / 'in/out').rglob('*.png')} == names
    done = restore(identity, 'in', '-r', '--resume', '-o', 'in/out', cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == 'in/out: 0 restored, 0 failed, 3 already done', 'results are no pictures'
    done = restore(identity, 'in/**/x.png', '-o', 'pattern', cwd=tmp_path)
    assert {str(f.relative_to(tmp_path / 'pattern')) for f in (tmp_path / 'pattern').rglob('*.png')} == names | {
        'out/x.png',
        'out/a/x.png',
        'out/a/b/x.png',
    }


def test_every_readable_format_is_found_in_a_folder(identity, tmp_path):
    (tmp_path / 'in').mkdir()
    for name in ('a.avif', 'b.jp2', 'c.ppm', 'd.gif'):
        Image.fromarray(smooth(64, 64)).save(tmp_path / 'in' / name)
    for name in ('e.jfif', 'f.jpe'):
        Image.fromarray(smooth(64, 64)).save(tmp_path / 'in' / name, 'jpeg')
    (tmp_path / 'in/dead.png').symlink_to('nowhere.png')
    done = restore(identity, 'in', '-o', 'out', cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == 'out: 5 restored, 2 failed', done.stdout
    assert 'in/d.gif: .gif cannot be written; use --ext png' in done.stdout
    assert 'in/dead.png: ' in done.stdout
    done = restore(identity, 'in', '--ext', 'png', '-o', 'out', cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == 'out: 6 restored, 1 failed', done.stdout


def test_outputs_that_are_impossible_are_refused_in_one_line_before_the_work(identity, tmp_path):
    for name in 'x.png', 'y.png':
        Image.fromarray(noise(9, 8, 3)).save(tmp_path / name)
    (tmp_path / 'file').write_text('')
    wrong = {
        ('x.png', '-o', 'file'): 'file: it is a file; expected a folder or one picture',
        (
            'x.png',
            '-o',
            'file/below/out',
        ): f'file/below/out: {tmp_path}/file is a file; expected a folder or one picture',
        ('x.png', 'y.png', '-o', 'z.png'): 'z.png: would be the result of both x.png and y.png; use a folder',
        ('x.png', '-o', 'z.png', '--ext', 'tif'): 'z.png: must have the extension of --ext .tif',
        ('x.png', '-o', 'x.png'): 'x.png: would overwrite an input; choose another -o, or a --suffix',
    }
    for arguments, message in wrong.items():
        done = restore(identity, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, f'{message}\n'), arguments
    done = restore(identity, 'x.png', '-o', '/proc/nowhere/out', cwd=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stdout and len(done.stdout.splitlines()) == 1, done.stdout
    done = restore(identity, 'x.png', '--ext', 'heic', '-o', 'out', cwd=tmp_path)
    assert done.returncode == 2 and '--ext: must be one of png, ' in done.stdout


def test_names_that_the_terminal_cannot_show_are_escaped(identity, tmp_path):
    name = os.fsdecode(b'b\xc3\xa4r-\xff.png')
    Image.fromarray(noise(9, 8, 3)).save(tmp_path / 'x.png')
    (tmp_path / 'x.png').rename(tmp_path / name)
    for environment in ({'PYTHONIOENCODING': 'ascii'}, {'PYTHONIOENCODING': 'utf-8'}):
        arguments = ('-w', identity, name, '-o', name[:-4])
        done = warm_python('-m', 'dpmambair_basicsr.restore', *arguments, cwd=tmp_path, **environment)
        assert done.returncode == 0 and '1 restored, 0 failed' in done.stdout, done.stdout
        assert (tmp_path / name[:-4] / name).is_file()


def test_every_picture_has_its_line_immediately(identity, tmp_path):
    """In a log file too; and Ctrl-C ends it with one more line, no partial file, and status 130."""
    for number in range(40):
        Image.fromarray(smooth(64, 64, number)).save(tmp_path / f'{number:02}.png')
    arguments = [sys.executable, '-m', 'dpmambair_basicsr.restore', '-w', identity, '.', '-o', 'out']
    environment = os.environ | {'PYTHONPATH': str(PACKAGE_PARENT), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = process.stdout.readline()
    assert process.poll() is None and first.startswith('00.png: 64 x 64, '), 'before the others are done'
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and 'Traceback' not in rest, rest
    assert rest.splitlines()[-1] == 'stopped by Ctrl-C; --resume continues'
    results = sorted(file.name for file in (tmp_path / 'out').iterdir())
    assert results[0] == '00.png' and len(results) < 40 and not any('part' in name for name in results)


def test_a_full_disk_ends_the_command_immediately(identity, tmp_path, monkeypatch):
    for number in range(4):
        Image.fromarray(noise(64, 64, 3, seed=number)).save(tmp_path / f'{number}.png')

    def write(path, *rest, **options):
        raise OSError(errno.ENOSPC, 'No space left on device', str(path))

    monkeypatch.setattr(pictures, 'write_bytes', write)
    done = restore(identity, '.', '-o', 'out', cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    last = 'out: 0 restored, 1 failed, 3 not tried: free some space and use --resume'
    assert done.stdout.splitlines()[-1] == last and 'No space left on device' in done.stdout


def test_limits_of_file_size_are_an_error_of_each_picture(identity, tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / 'large.png')
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / 'small.png')
    command = (
        f'ulimit -f 4; exec {sys.executable} -m dpmambair_basicsr.restore -w {identity} large.png small.png -o out'
    )
    done = run('bash', '-c', command, cwd=tmp_path, NUMBA_CACHE_DIR=tmp_path / 'numba')
    assert done.stdout.splitlines()[-1] == 'out: 1 restored, 1 failed', done.stdout
    assert [file.name for file in (tmp_path / 'out').iterdir()] == ['small.png']
