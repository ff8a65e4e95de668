"""Image files, read and written back, and the command that restores them."""

import io
import json

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageCms, ImageOps
from support.commands import command
from support.restorers import VMAMBAIR, photo, restorer_of

from dpmambair_basicsr import restore
from dpmambair_basicsr.files.pictures import read_picture, restored_picture, write_picture

# Picture files

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def encode(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def again(path):
    """Reads the file at path, and writes it back."""
    picture = read_picture(path)
    write_picture(path, picture)
    return picture


@pytest.mark.parametrize(
    ('kind', 'modes'),
    [
        ('png', ['RGB', 'RGBA', 'L', '1', 'P']),
        ('tiff', ['RGB', 'L', '1', 'P']),
        ('bmp', ['RGB', 'L', 'P']),
        ('webp', ['RGB', 'RGBA']),
        ('jpeg', ['RGB', 'L']),
    ],
)
def test_pixels_and_alpha_survive_a_round_trip(kind, modes, tmp_path):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8))
    for mode in modes:
        image = colours if mode == 'RGBA' else colours.convert('RGB').convert(mode)
        path = tmp_path / f'{mode}.{kind}'
        path.write_bytes(encode(image, kind, **({'lossless': True} if kind == 'webp' else {})))
        with Image.open(path) as before:
            wanted = before.convert({'P': 'RGB', '1': 'L'}.get(before.mode, before.mode))
        picture = again(path)
        assert picture.image.shape == (7, 5, 3) and (picture.alpha is not None) == (mode == 'RGBA')
        with Image.open(path) as after:
            assert after.mode == wanted.mode
            np.testing.assert_allclose(np.asarray(after, int), np.asarray(wanted, int), atol=8 * (kind == 'jpeg'))


@pytest.mark.parametrize(('kind', 'channels'), [('png', 1), ('png', 3), ('png', 4), ('tiff', 1), ('tiff', 3)])
def test_16_bit_images_survive_a_round_trip(kind, channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (7, 5, channels), dtype=np.uint16)
    path = tmp_path / f'a.{kind}'
    assert cv2.imwrite(str(path), pixels)
    assert again(path).image.dtype == np.uint16
    np.testing.assert_array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED).reshape(pixels.shape), pixels)


@pytest.mark.parametrize('kind', ['png', 'jpeg', 'webp'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_applied_and_profile_and_exif_are_kept(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x9286] = orientation, 'a description', b'comment'
    exif.get_ifd(0x8825)[1] = 'N'
    image = Image.fromarray(np.repeat(np.repeat(photo(3, 4), 8, 0), 8, 1))
    path = tmp_path / f'a.{kind}'
    path.write_bytes(encode(image, kind, exif=exif, icc_profile=SRGB))
    with Image.open(path) as before:
        upright = np.asarray(ImageOps.exif_transpose(before).convert('RGB'), int)
    picture = again(path)
    np.testing.assert_allclose(picture.image.astype(int), upright, atol=4)
    with Image.open(path) as after:
        assert after.info['icc_profile'] == SRGB
        assert dict(after.getexif()).items() >= {**exif, 0x0112: 1}.items()
        assert after.getexif().get_ifd(0x8825) == {1: 'N'}
        np.testing.assert_allclose(np.asarray(ImageOps.exif_transpose(after).convert('RGB'), int), upright, atol=6)


@pytest.mark.parametrize('damage', [b'', b'MM', b'II*\0\xff\xff\xff\xff', b'II*\0\x08\0\0\0\xff\xff\x12\x01'])
def test_damaged_exif_data_is_left_alone(damage, tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(encode(Image.fromarray(photo(4, 6)), 'png', exif=b'Exif\0\0' + damage))
    assert again(path).image.shape == (4, 6, 3)


def test_cmyk_becomes_rgb_without_its_profile(tmp_path):
    path = tmp_path / 'a.jpg'
    profile = bytearray(SRGB)
    profile[16:20] = b'CMYK'
    image = Image.fromarray(photo(40, 30)).convert('CMYK')
    path.write_bytes(encode(image, 'jpeg', quality=98, icc_profile=bytes(profile)))
    again(path)
    with Image.open(path) as after:
        assert after.mode == 'RGB' and 'icc_profile' not in after.info
        assert np.abs(np.asarray(after, int) - np.asarray(image.convert('RGB'))).mean() < 3


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('text.png', b'no picture', 'not a picture, or truncated'),
        ('empty.png', b'', 'is empty'),
        ('half.png', encode(Image.fromarray(photo(60, 60)), 'png')[:2000], 'not a picture, or truncated'),
        ('half.jpg', encode(Image.fromarray(photo(60, 60)), 'jpeg')[:1200], 'not a picture, or truncated'),
        ('float.tif', encode(Image.fromarray(np.zeros((4, 4), np.float32)), 'tiff'), 'has float32 values'),
    ],
)
def test_files_that_are_not_pictures_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_picture(tmp_path / name)


def test_nothing_is_dropped_silently_and_no_partial_file_is_left(tmp_path):
    (tmp_path / 'a.png').write_bytes(encode(Image.fromarray(photo(4, 4)).convert('RGBA'), 'png'))
    assert cv2.imwrite(str(tmp_path / 'b.png'), np.zeros((4, 4, 3), np.uint16))
    wide = restored_picture(read_picture(tmp_path / 'b.png'), np.zeros((1, 70000, 3), np.uint8))
    refused = {
        ('a.png', 'x.jpg', 'jpg does not support its alpha'): read_picture(tmp_path / 'a.png'),
        ('b.png', 'x.webp', 'webp does not support its 16 bit'): read_picture(tmp_path / 'b.png'),
        ('b.png', 'x.jpg', 'cannot be written as .jpg, 70000 x 1'): wide,
        ('b.png', 'x.xyz', '.xyz cannot be written; use --ext png'): wide,
    }
    for (_, name, message), picture in refused.items():
        with pytest.raises(ValueError, match=message):
            write_picture(tmp_path / name, picture)
    (tmp_path / 'folder.png').mkdir()
    with pytest.raises(OSError):
        write_picture(tmp_path / 'folder.png', read_picture(tmp_path / 'a.png'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'b.png', 'folder.png']


# The command


def write_pictures(folder):
    """Some thirty files of every kind; returns {name: whether it can be restored}, without those to be skipped."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    colours, small = photo(37, 45), Image.fromarray(photo(24, 33))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = {
        'fine.png': rng.integers(0, 65536, (19, 22, 3), dtype=np.uint16),
        'fine_grey.png': rng.integers(0, 65536, (19, 22), dtype=np.uint16),
        'fine_alpha.png': rng.integers(0, 65536, (19, 22, 4), dtype=np.uint16),
        'fine.tif': rng.integers(0, 65536, (19, 22, 3), dtype=np.uint16),
        'one.png': colours[:1, :1],
        'row.png': colours[:1],
        'column.bmp': colours[:, :1],
        'wide.png': rng.integers(0, 256, (40, 5000, 3), dtype=np.uint8),
        'multiple.png': colours[:32, :40],
        'a name with spaces.png': colours,
        'bild-\u00e4\u4e2d.png': colours,
        'LOUD.PNG': colours,
        'same.png': colours,
        'same.webp': colours,
        'same.bmp': colours,
        'same.tiff': colours,
    }
    for name, image in pixels.items():
        suffix = '.' + name.lower().rpartition('.')[2]
        quality = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == '.webp' else []
        (folder / name).write_bytes(cv2.imencode(suffix, image, quality)[1])
    contents = {
        'photo.jpg': encode(small, 'jpeg', quality=95),
        'photo.jpeg': encode(small, 'jpeg', quality=95),
        'grey.jpg': encode(small.convert('L'), 'jpeg'),
        'cmyk.jpg': encode(small.convert('CMYK'), 'jpeg'),
        'turned.jpg': encode(small, 'jpeg', exif=exif, icc_profile=SRGB),
        'profile.png': encode(small, 'png', icc_profile=SRGB),
        'grey.png': encode(small.convert('L'), 'png'),
        'alpha.png': encode(Image.fromarray(rng.integers(0, 256, (9, 8, 4), dtype=np.uint8)), 'png', icc_profile=SRGB),
        'grey_alpha.png': encode(small.convert('LA'), 'png'),
        'palette.png': encode(small.convert('P'), 'png'),
        'bit.png': encode(small.convert('1'), 'png'),
    }
    broken = {
        'text.png': b'this is text',
        'empty.png': b'',
        'half.png': encode(small, 'png')[:1000],
        'half.jpg': encode(small, 'jpeg')[:-50],
        'float.tif': encode(Image.fromarray(np.zeros((4, 4), np.float32)), 'tiff'),
    }
    for name, content in {**contents, **broken, 'Thumbs.db': b'', '.hidden.png': b'', 'notes.txt': b''}.items():
        (folder / name).write_bytes(content)
    (folder / 'folder.png').mkdir()
    return dict.fromkeys([*pixels, *contents], True) | dict.fromkeys(broken, False)


def identity(folder, name, network):
    """A checkpoint, in folder, of a network that returns its input, upscaled by repetition."""
    net = restorer_of(network).net
    (net.output if net.scale == 1 else net.tail[-1]).weight.zero_()
    if net.scale > 1:
        net.tail[-1].bias.zero_()
    torch.save({'params': net.state_dict(), 'network_g': network}, folder / name)
    return folder / name


@pytest.fixture(scope='module')
def restored(tmp_path_factory):
    """(folder, {name: restorable}, output of the command), for the picture folder after one run by an identity."""
    folder = tmp_path_factory.mktemp('restored')
    names = write_pictures(folder / 'in')
    weights = identity(folder, 'identity.pth', VMAMBAIR)
    process = command('restore', '-w', weights, 'in', '-o', 'out', cwd=folder)
    assert process.returncode == 1, process.stdout
    return folder, names, process.stdout


def test_the_command_restores_what_can_be_and_reports_the_rest(restored):
    folder, names, output = restored
    good = {name for name, restorable in names.items() if restorable}
    assert len(names) > 30 and {path.name for path in (folder / 'out').iterdir()} == good
    for name in names.keys() - good:
        assert len([line for line in output.splitlines() if line.startswith(f'in/{name}: ')]) == 1, output
    assert output.splitlines()[-1] == f'out: {len(good)} restored, {len(names) - len(good)} failed'
    assert 'Traceback' not in output


def test_an_identity_network_changes_no_pixel(restored):
    folder, names, _ = restored
    for name in (name for name, restorable in names.items() if restorable):
        before, after = (cv2.imread(str(folder / kind / name), cv2.IMREAD_UNCHANGED) for kind in ('in', 'out'))
        if name == 'turned.jpg':
            before = cv2.rotate(before, cv2.ROTATE_90_CLOCKWISE)
        assert after.dtype == before.dtype and after.shape == before.shape, name
        lossy = name.endswith(('jpg', 'jpeg'))
        assert np.abs(after.astype(int) - before).mean() < 2 if lossy else np.array_equal(after, before), name


def test_profile_orientation_and_mode_are_kept(restored):
    folder, _, _ = restored
    for name, mode in {'profile.png': 'RGB', 'alpha.png': 'RGBA', 'turned.jpg': 'RGB', 'cmyk.jpg': 'RGB'}.items():
        with Image.open(folder / 'out' / name) as image:
            assert image.mode == mode and image.info.get('icc_profile') == (None if 'cmyk' in name else SRGB)
    with Image.open(folder / 'out/turned.jpg') as image:
        assert image.size == (24, 33) and image.getexif()[0x0112] == 1
    for name, mode in {'grey.jpg': 'L', 'grey.png': 'L', 'fine_grey.png': 'I;16'}.items():
        with Image.open(folder / 'out' / name) as image:
            assert image.mode == mode


def test_resume_restores_only_missing_files_and_tiles_change_nothing_here(restored):
    folder, names, _ = restored
    out = folder / 'out'
    before = (out / 'wide.png').read_bytes()
    (out / 'wide.png').unlink()
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    arguments = ('-w', 'identity.pth', '--input', 'in/*[e-y].png', '--output', 'out', '--resume', '--tile', '64')
    process = command('restore', *arguments, cwd=folder)
    asked = [good for name, good in names.items() if name.endswith('.png') and 'e' <= name[-5] <= 'y']
    assert process.returncode == 1, process.stdout
    counts = f'1 restored, {asked.count(False)} failed, {asked.count(True) - 1} already done'
    assert process.stdout.splitlines()[-1] == f'out: {counts}'
    assert (out / 'wide.png').read_bytes() == before
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != 'wide.png'}


def run_main(monkeypatch, *arguments):
    """The command in this process: the exit status."""
    monkeypatch.setattr('sys.argv', ['restore', *map(str, arguments)])
    return restore.main()


def test_super_resolution_supports_compare_suffix_and_an_old_checkpoint(monkeypatch, tmp_path):
    network = {**VMAMBAIR, 'scale': 4}
    weights = identity(tmp_path, 'sr.pth', network)
    torch.save({'params': torch.load(weights)['params']}, weights)
    (tmp_path / 'old.yml').write_text(yaml.safe_dump({'name': 'old', 'network_g': network}))
    pixels = np.random.default_rng(0).integers(1, 256, (9, 13, 4), dtype=np.uint8)  # no alpha is 0: it hides colours
    assert cv2.imwrite(str(tmp_path / 'a.png'), pixels)
    arguments = ('-w', weights, tmp_path / 'a.png', '-o', tmp_path / 'out', '--opt', tmp_path / 'old.yml')
    assert run_main(monkeypatch, *arguments, '--suffix', '_x4', '--compare', '--self-ensemble', '--half') == 0
    result = cv2.imread(str(tmp_path / 'out/a_x4.png'), cv2.IMREAD_UNCHANGED)
    enlarged = pixels.repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(result[..., :3], enlarged[..., :3])
    assert np.abs(result[..., 3].astype(int) - enlarged[..., 3]).mean() < 40, 'alpha is interpolated'
    both = cv2.imread(str(tmp_path / 'out/compare/a_x4.png'), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(both[:, : 4 * 13, :3], enlarged[..., :3])
    np.testing.assert_array_equal(both[:, 4 * 13 :], result)


def test_wrong_arguments_end_with_one_line(monkeypatch, tmp_path):
    weights = identity(tmp_path, 'identity.pth', VMAMBAIR)
    for folder in ('a', 'b', 'none', 'c/compare'):
        (tmp_path / folder).mkdir(parents=True)
    for name in ('a/x.png', 'b/x.png', 'a/x_2.png', 'c/x.png', 'c/compare/x.png'):
        cv2.imwrite(str(tmp_path / name), photo(8, 8))
    (tmp_path / 'empty.yml').write_text('name: no network')
    monkeypatch.chdir(tmp_path)
    wrong = {
        ('nowhere/*.png', '-o', 'out'): r'^nowhere/\*\.png: no pictures found$',
        ('none', '-o', 'out'): '^none: no pictures found$',
        ('missing', '-o', 'out'): '^missing: no such file or folder$',
        ('a', 'b', '-o', 'out'): '^out/x.png: would be the result of both a/x.png and b/x.png; use -r to keep',
        ('a', '-o', 'a'): '^a/x.png: would overwrite an input',
        ('a', '-o', 'a', '--suffix', '_2'): '^a/x_2.png: would overwrite an input',
        ('c', '-r', '-o', 'out', '--compare'): '^out/compare/x.png: would be a result and what --compare writes',
        ('a', '-o', 'out', '--table', 'a/x.png/t.csv'): '^a/x.png: it is a file; expected a folder$',
        (
            'a',
            '-o',
            'out',
            '--report',
            'empty.yml/r/r.html',
        ): 'empty.yml/r: .*empty.yml is a file; expected a folder$',
        ('a', '-o', 'out', '--opt', 'empty.yml'): '^empty.yml: network_g: missing$',
        ('a', '-o', 'out', '-w', 'a/x.png'): '^a/x.png: not a checkpoint',
        ('a', '-o', 'out', '-w', 'missing.pth'): 'missing.pth',
        ('a', '-o', 'out', '--device', 'gpu'): "^device: must be one of auto, cpu, cuda, mps, got 'gpu'",
    }
    for arguments, message in wrong.items():
        with pytest.raises(SystemExit, match=message):
            run_main(monkeypatch, '-w', weights, *arguments)
    for arguments in ([], ['a', '--tile', '-1'], ['a', '--overlap', 'x'], ['--report', 'a/x.png', 'a/x_2.png']):
        with pytest.raises(SystemExit) as ended:
            run_main(monkeypatch, '-w', weights, '-o', 'out', *arguments)
        assert ended.value.code == 2
    assert not (tmp_path / 'out').exists() and cv2.imread('a/x.png') is not None
    assert run_main(monkeypatch, '-w', weights, 'a', 'a/x.png', '-o', 'out') == 0, 'a picture named twice is one'


def test_a_comparison_that_the_format_cannot_hold_costs_no_result(monkeypatch, tmp_path, capsys):
    weights = identity(tmp_path, 'identity.pth', VMAMBAIR)
    wide = photo(8, 8).repeat(1050, 1)
    (tmp_path / 'wide.webp').write_bytes(cv2.imencode('.webp', wide, [cv2.IMWRITE_WEBP_QUALITY, 101])[1])
    arguments = ('-w', weights, tmp_path / 'wide.webp', '-o', tmp_path / 'out', '--compare', '--one-pass')
    assert run_main(monkeypatch, *arguments, '--report', tmp_path / 'r.html') == 0
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / 'out/wide.webp')), wide)
    assert 'not compared: ' in capsys.readouterr().out and not [*(tmp_path / 'out/compare').iterdir()]


@pytest.mark.parametrize('error', [KeyError(2), KeyboardInterrupt()], ids=['any error', 'Ctrl-C'])
def test_what_was_done_before_an_error_is_recorded(error, monkeypatch, tmp_path, capsys):
    weights = identity(tmp_path, 'identity.pth', VMAMBAIR)
    for name in 'abc':
        cv2.imwrite(str(tmp_path / f'{name}.png'), photo(8, 8))
    cv2.imwrite(str(tmp_path / 'line.jpg'), np.zeros((1, 3000, 3), np.uint8))
    read = restore.read_pictures

    def read_or_raise(source):
        if source.name == 'b.png':
            raise error
        return read(source)

    monkeypatch.setattr(restore, 'read_pictures', read_or_raise)
    arguments = ('-w', weights, tmp_path / 'line.jpg', tmp_path / '?.png', '-o', tmp_path / 'out')
    status = run_main(monkeypatch, *arguments, '--table', tmp_path / 't.json', '--report', tmp_path / 'r.html')
    actions = [row['action'] for row in json.loads((tmp_path / 't.json').read_text())]
    if isinstance(error, KeyError):
        assert status == 1 and actions == ['restored', 'restored', 'failed: KeyError 2', 'restored']
        assert capsys.readouterr().err.count('b.png: KeyError 2') == 1
    else:
        assert status == 130 and actions == ['restored', 'restored', 'not tried', 'not tried']
    assert 'line.jpg' in (tmp_path / 'r.html').read_text()
