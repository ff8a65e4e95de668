"""prepare_data on miniature trees with the published layouts: what it arranges, refuses and resumes.

Miniature trees have fewer images than the published sets, so the commands have --any-count.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from basicsr.data import build_dataset
from basicsr.utils.matlab_functions import imresize
from support.commands import PACKAGE_PARENT, warm_python

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable, and registers the datasets)
from dpmambair_basicsr import prepare_data
from dpmambair_basicsr.prepare.images import shrink
from dpmambair_basicsr.prepare.public_sets import SETS, Layout, compile_pattern, pair, spaced

SCRIPT = PACKAGE_PARENT / 'dpmambair_basicsr' / 'prepare_data.py'
SHARED = Path(__file__).parents[2] / 'shared' / 'data'
prepare = prepare_data.main

# {set: [(LQ files or None, GT files, result folder, stems)]}, {n} counts. In the order in which the parts are declared.
ALL = 'all_in_one'
TREES = {
    'reside6k': [
        ('RESIDE-6K/train/hazy/{n}.jpg', 'RESIDE-6K/train/GT/{n}.jpg', f'{ALL}/train/haze', '{n}'),
        ('RESIDE-6K/test/hazy/00{n}.jpg', 'RESIDE-6K/test/GT/00{n}.jpg', f'{ALL}/test/haze', '00{n}'),
    ],
    'rain13k': [('train/Rain13K/input/{n}.jpg', 'train/Rain13K/target/{n}.jpg', 'Rain13K', '{n}')],
    'rain100h': [('test/Rain100H/input/{n}.png', 'test/Rain100H/target/{n}.png', 'Rain100H', '{n}')],
    'rain100l': [('test/Rain100L/input/{n}.png', 'test/Rain100L/target/{n}.png', 'Rain100L', '{n}')],
    'test100': [('test/Test100/input/{n}.png', 'test/Test100/target/{n}.png', 'Test100', '{n}')],
    'test1200': [('test/Test1200/input/{n}.png', 'test/Test1200/target/{n}.png', 'Test1200', '{n}')],
    'test2800': [('test/Test2800/input/90{n}_1.jpg', 'test/Test2800/target/90{n}_1.jpg', 'Test2800', '90{n}_1')],
    'snow100k': [
        ('all/synthetic/city_0{n}.jpg', 'all/gt/city_0{n}.jpg', f'{ALL}/train/snow', 'city_0{n}'),
        (
            'media/jdway/GameSSD/overlapping/test/Snow100K-L/synthetic/beautiful_smile_0{n}.jpg',
            'media/jdway/GameSSD/overlapping/test/Snow100K-L/gt/beautiful_smile_0{n}.jpg',
            f'{ALL}/test/snow',
            'L_beautiful_smile_0{n}',
        ),
    ],
    'lol': [
        ('LOLdataset/our485/low/{n}.png', 'LOLdataset/our485/high/{n}.png', f'{ALL}/train/lowlight', 'lol_{n}'),
        ('LOLdataset/eval15/low/{n}.png', 'LOLdataset/eval15/high/{n}.png', f'{ALL}/test/lowlight', 'lol_{n}'),
    ],
    'lsrw': [
        (
            'LSRW/Training data/Nikon/low/{n}.jpg',
            'LSRW/Training data/Nikon/high/{n}.jpg',
            f'{ALL}/train/lowlight',
            'lsrw_Nikon_{n}',
        ),
        ('LSRW/Eval/Huawei/low/{n}.jpg', 'LSRW/Eval/Huawei/high/{n}.jpg', f'{ALL}/test/lowlight', 'lsrw_Huawei_{n}'),
    ],
    'gopro': [
        (
            f'GOPRO_Large/{split}/GOPR0372_07_0{{n}}/blur/000047.png',
            f'GOPRO_Large/{split}/GOPR0372_07_0{{n}}/sharp/000047.png',
            f'{ALL}/{split}/blur',
            'GOPR0372_07_0{n}-000047',
        )
        for split in ('train', 'test')
    ],
    'waterlooed': [
        (None, 'exploration_database_and_code/pristine_images/0000{n}.bmp', f'{ALL}/train/clean', '0000{n}')
    ],
    'bsd400': [(None, 'BSD400/100{n}.jpg', f'{ALL}/test/clean', '100{n}')],
    'df2k': [
        (None, 'DIV2K_train_HR/000{n}.png', 'DF2K', 'div2k_000{n}'),
        (None, 'Flickr2K/Flickr2K_HR/00000{n}.png', 'DF2K', 'flickr2k_00000{n}'),
    ],
    'ost': [(None, 'OutdoorSceneTrain_v2/animal/n0157 {n}.png', 'DF2K_OST/OST', 'animal_n0157_{n}')],
    'set14': [(None, 'Set14/img_{n}.png', 'Set14', 'img_{n}')],
    'general100': [(None, 'General100/im_{n}.bmp', 'General100', 'im_{n}')],
    'urban100': [
        (
            'Urban100/image_SRF_4/img_00{n}_SRF_4_LR.png',
            'Urban100/image_SRF_4/img_00{n}_SRF_4_HR.png',
            'Urban100',
            'img_00{n}',
        )
    ],
    'manga109': [(None, 'Manga109/Arms{n}.png', 'Manga109', 'Arms{n}')],
    'div2k100': [(None, 'DIV2K_valid_HR/080{n}.png', 'DIV2K100', '080{n}')],
    'ntire2020': [('Corrupted-va-x/080{n}.png', 'track1-valid-gt/080{n}.png', 'NTIRE2020', '080{n}')],
    'aim2019': [('AIM19/valid-input-noisy/080{n}.png', 'AIM19/valid-gt-clean/080{n}.png', 'AIM2019', '080{n}')],
}
COUNT = 3
X4 = [name for name, public in SETS.items() if any(part.scale == 4 for part in public.parts.values())]


def level(number: int) -> int:
    """Brightness of a GT image, which identifies it."""
    return 60 + 60 * number


def write(path: Path, height: int, width: int, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), value, np.uint8))


def make_tree(root: Path, name: str, count: int = COUNT, trees: list | None = None) -> Path:
    """The download of a set, in its own folder; the brightness of an image identifies its pair."""
    for lq, gt, *_ in trees or TREES[name]:
        for number in range(count):
            height, width = (50, 41) if name == 'set14' else (48, 40)
            write(root / gt.format(n=number), height, width, level(number))
            if lq:
                scale = 4 if name in X4 else 1
                write(root / lq.format(n=number), height // scale, width // scale, level(number) // 2)
    return root


def brightness(path) -> float:
    return float(cv2.imread(str(path)).mean())


def stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.iterdir() if not path.name.startswith('.'))


def contents(folder: Path) -> dict[str, str]:
    """{file: digest}, following links."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob('*')
        if path.is_file() and '.prepared' not in path.parts
    }


def refusal(*arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        prepare([str(argument) for argument in arguments])
    return str(caught.value)


def arrange(*arguments) -> None:
    prepare([*map(str, arguments), '--any-count'])


@pytest.fixture(scope='module')
def everything(tmp_path_factory):
    """All sets in one `datasets`; returns its parent and the previous contents of the downloads."""
    root = tmp_path_factory.mktemp('everything')
    before = {}
    for name in TREES:
        before[name] = contents(make_tree(root / 'raw' / name, name))
        arrange(name, root / 'raw' / name, '--output', root / 'datasets')
    return root, before


def test_every_set_is_tested_and_documented():
    assert list(TREES) == list(SETS)
    table = (PACKAGE_PARENT / 'docs' / 'data.md').read_text(encoding='utf-8')
    for name, public in SETS.items():
        (row,) = re.findall(rf'^\| {re.escape(public.title)} .*\| `{name} .*$', table, re.MULTILINE)
        counts = [re.findall(r'\d+', number) for number in re.split(r' \| ', row)[2:3]]
        for part in public.parts.values():
            assert str(part.counts[0]) in counts[0], row
            folder = part.gt if part.lq is None else str(Path(part.gt).parent)
            assert f'`{folder}' in row, row
            assert part.lq is None or Path(part.lq).parent == Path(part.gt).parent


@pytest.mark.parametrize('name', TREES)
def test_pairs_are_where_the_options_expect_them(name, everything):
    root, before = everything
    assert contents(root / 'raw' / name) == before[name]
    for (lq, gt, folder, stem), part in zip(TREES[name], SETS[name].parts.values(), strict=True):
        expected = [stem.format(n=number) for number in range(COUNT)]
        gt_folder, lq_folder = (side and root / 'datasets' / side for side in (part.gt, part.lq))
        assert gt_folder.is_relative_to(root / 'datasets' / folder)
        if part.make == 'sub_images':
            endings = ('', 'T0', 'T1', 'T2', 'T3') if lq_folder else ('',)
            expected = [f'{one}{ending}_s001' for one in expected for ending in endings]
        for side in filter(None, (gt_folder, lq_folder)):
            assert set(expected) <= set(stems(side))
        for number in range(COUNT):
            result = next(gt_folder.glob(f'{expected[number * len(expected) // COUNT]}.*'))
            assert brightness(result) == pytest.approx(level(number), abs=1)
            if part.make != 'sub_images':
                assert os.readlink(result) == str(root / 'raw' / name / gt.format(n=number))
            if lq_folder:
                partner = next(lq_folder.glob(f'{result.stem}.*'))
                assert brightness(partner) == pytest.approx(level(number) // (2 if lq else 1), abs=1)


def test_no_other_files_are_left(everything):
    root, _ = everything
    hidden = {path.name for path in (root / 'datasets').rglob('.*')}
    assert hidden == {'.prepared'}
    assert stems(root / 'datasets' / ALL / 'test' / 'lowlight' / 'LQ') == [
        *(f'lol_{n}' for n in range(COUNT)),
        *(f'lsrw_Huawei_{n}' for n in range(COUNT)),
    ]


OPTION_FILES = [
    file
    for file in sorted((PACKAGE_PARENT / 'options').glob('*.yml'))
    if not re.search('demo|your_own|small', file.name)
]


@pytest.mark.parametrize('file', OPTION_FILES, ids=lambda file: file.name)
def test_datasets_of_our_option_files_exist(file, everything, monkeypatch):
    """Every public dataset of the option files exists; those without crops can be read."""
    monkeypatch.chdir(everything[0])
    opt = yaml.safe_load(file.read_text(encoding='utf-8'))
    assert opt['datasets']
    for key, dataset in opt['datasets'].items():
        phase = key.split('_')[0]
        built = build_dataset({**dataset, 'phase': phase, 'scale': opt['scale']})
        assert len(built) >= COUNT
        if phase != 'train':
            assert built[0]['gt'].shape[-1] == opt['scale'] * built[0]['lq'].shape[-1]


def test_all_in_one_has_the_seven_degradations():
    opt = yaml.safe_load((PACKAGE_PARENT / 'options' / 'test_all_in_one.yml').read_text(encoding='utf-8'))
    train = yaml.safe_load((PACKAGE_PARENT / 'options' / 'train_dpmambair.yml').read_text(encoding='utf-8'))
    kinds = [data.get('degradation') or list(data['degradations'])[0] for data in opt['datasets'].values()]
    parts = train['datasets']['train']['datasets']
    assert kinds == list(parts)
    for data in opt['datasets'].values():
        for kind in data.get('degradations', ()):
            assert data['degradations'] == parts[kind]['degradations']
    assert all(train['network_g'][key] == value for key, value in opt['network_g'].items())


# Other published layouts of a set: {name: (set, trees)}
OTHERS = {
    'Rain100H in one folder': ('rain100h', ('Rain100H/rainy/rain-00{n}.png', 'Rain100H/norain-00{n}.png', '', '00{n}')),
    'Rain100L in two': ('rain100l', ('Rain100L/rain/rain-00{n}.png', 'Rain100L/norain/norain-00{n}.png', '', '00{n}')),
    'Rain13K alone': ('rain13k', ('train/input/{n}.jpg', 'train/target/{n}.jpg', '', '{n}')),
    'GoPro as input and target': (
        'gopro',
        ('test/GoPro/input/GOPR1_1-0{n}.png', 'test/GoPro/target/GOPR1_1-0{n}.png', '', 'GOPR1_1-0{n}'),
    ),
    'BSDS500': ('bsd400', (None, 'BSR/BSDS500/data/images/train/10{n}.jpg', '', '10{n}')),
    'EDSR collection': ('manga109', ('Manga109/LR_bicubic/X4/a{n}x4.png', 'Manga109/HR/a{n}.png', '', 'a{n}')),
    'BasicSR collection': ('general100', ('General100/LRbicx4/a{n}.png', 'General100/GTmod12/a{n}.png', '', 'a{n}')),
    'DIV2K with LR': (
        'div2k100',
        ('DIV2K_valid_LR_bicubic/X4/080{n}x4.png', 'DIV2K_valid_HR/080{n}.png', '', '080{n}'),
    ),
    'NTIRE 2020 as archived later': ('ntire2020', ('track1-valid-input/{n}.png', 'track1-valid-gt/{n}.png', '', '{n}')),
}


@pytest.mark.parametrize('case', OTHERS)
def test_other_published_layouts_are_recognised(case, tmp_path):
    name, tree = OTHERS[case]
    make_tree(tmp_path / 'raw', name, trees=[tree])
    split = 'train' if name == 'rain13k' else 'test'
    arrange(name, tmp_path / 'raw', '--output', tmp_path, '--part', split)
    part = SETS[name].parts[split]
    assert stems(tmp_path / part.gt) == [tree[3].format(n=number) for number in range(COUNT)]
    if tree[0]:
        lq = sorted((tmp_path / part.lq).iterdir())
        assert [brightness(path) for path in lq] == pytest.approx([level(n) // 2 for n in range(COUNT)], abs=1)


def test_several_rainy_images_share_their_truth(tmp_path):
    for scene in (1, 2):
        write(tmp_path / f'raw/testing/ground_truth/{scene}.jpg', 16, 16, 100 * scene)
        for key in (1, 14):
            write(tmp_path / f'raw/testing/rainy_image/{scene}_{key}.jpg', 16, 16, 100 * scene - key)
    arrange('test2800', tmp_path / 'raw', '--output', tmp_path)
    for side, less in (('GT', (0, 0)), ('LQ', (1, 14))):
        images = sorted((tmp_path / 'Test2800' / side).iterdir())
        assert [image.name for image in images] == ['1_1.jpg', '1_14.jpg', '2_1.jpg', '2_14.jpg']
        expected = [100 * scene - part for scene in (1, 2) for part in less]
        assert [brightness(image) for image in images] == pytest.approx(expected, abs=1)


def test_all_problems_are_in_one_report(tmp_path):
    raw = make_tree(tmp_path / 'raw', 'lol')
    (raw / 'LOLdataset/our485/low/0.png').unlink()
    (raw / 'LOLdataset/our485/high/1.png').write_bytes((raw / 'LOLdataset/our485/high/1.png').read_bytes()[:-40])
    (raw / 'LOLdataset/our485/low/2.png').write_bytes(b'')
    (raw / 'LOLdataset/eval15/high/0.png').unlink()
    write(raw / 'LOLdataset/eval15/low/1.png', 47, 40, 9)
    before = contents(raw)
    message = refusal('lol', raw, '--output', tmp_path / 'out')
    base = raw / 'LOLdataset'
    assert message.splitlines() == [
        'dpmambair_basicsr.prepare_data: LOL: 7 problems:',
        '  lol.train: found 2 pairs or clean images, published: 485 (see --any-count)',
        '  lol.test: found 2 pairs or clean images, published: 15 (see --any-count)',
        f'  lol.train: no LQ image for {base}/our485/high/0.png',
        f'  lol.test: no GT image for {base}/eval15/low/0.png',
        f'  lol.train: {base}/our485/high/1.png: cannot be decoded as an image',
        f'  lol.train: {base}/our485/low/2.png: cannot be decoded as an image',
        f'  lol.test: sizes do not match at scale 1: {base}/eval15/low/1.png is 40x47, '
        f'{base}/eval15/high/1.png is 40x48 (width x height)',
        'Nothing was put in place. Valid images are kept for the next run.',
    ]
    assert contents(raw) == before
    assert not [path for path in (tmp_path / 'out').rglob('[!.]*') if path.parent.name in ('GT', 'LQ')]

    make_tree(raw, 'lol')  # repaired
    arrange('lol', raw, '--output', tmp_path / 'out')
    assert len(stems(tmp_path / 'out' / ALL / 'train' / 'lowlight' / 'GT')) == COUNT


def test_bad_images_are_skipped_on_request(tmp_path, capsys):
    raw = make_tree(tmp_path / 'raw', 'rain100h')
    (raw / 'test/Rain100H/input/0.png').unlink()
    (raw / 'test/Rain100H/target/1.png').write_bytes(b'no image')
    arrange('rain100h', raw, '--output', tmp_path, '--skip-bad')
    assert stems(tmp_path / 'Rain100H' / 'GT') == stems(tmp_path / 'Rain100H' / 'LQ') == ['2']
    said = capsys.readouterr().err
    assert 'no LQ image for' in said and 'target/1.png: cannot be decoded as an image' in said and 'are skipped' in said
    (raw / 'test/Rain100H/target/2.png').write_bytes(b'no image')
    assert 'no images left' in refusal('rain100h', raw, '--output', tmp_path / 'b', '--skip-bad', '--any-count')


def test_two_images_of_the_same_name_are_refused(tmp_path):
    raw = make_tree(tmp_path / 'raw', 'rain100h')
    write(raw / 'test/Rain100H/target/1.bmp', 48, 40, 0)
    assert 'two images of the same name' in refusal('rain100h', raw, '--output', tmp_path, '--any-count')


def archive(folder: Path, file: Path) -> Path:
    """With the files that macOS and Windows add, and in an order in which pairs are far apart."""
    (folder / '__MACOSX').mkdir()
    (folder / '__MACOSX' / '._1.png').write_bytes(b'no image')
    (folder / 'Thumbs.db').write_bytes(b'no image')
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    if file.suffix == '.zip':
        with zipfile.ZipFile(file, 'w') as packed:
            for path in paths:
                packed.write(path, path.relative_to(folder))
    else:
        with tarfile.open(file, 'w:gz') as packed:
            packed.add(folder, './')
    return file


@pytest.mark.parametrize('ending', ['zip', 'tar.gz'])
def test_archives_give_what_folders_give(ending, tmp_path):
    raw = make_tree(tmp_path / 'raw', 'gopro')
    arrange('gopro', raw, '--output', tmp_path / 'folder')
    file = archive(raw, tmp_path / f'GoPro.{ending}')
    before = file.read_bytes()
    arrange('gopro', file, '--output', tmp_path / 'archive')
    assert contents(tmp_path / 'archive') == contents(tmp_path / 'folder')
    assert not any(path.is_symlink() for path in (tmp_path / 'archive').rglob('*.png'))
    assert file.read_bytes() == before


def test_a_damaged_archive_is_refused(tmp_path):
    file = archive(make_tree(tmp_path / 'raw', 'rain100h'), tmp_path / 'data.zip')
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as packed:
        offset = packed.getinfo('test/Rain100H/input/1.png').header_offset
    content[offset + 70 : offset + 80] = bytes(10)
    file.write_bytes(content)
    message = refusal('rain100h', file, '--output', tmp_path / 'out', '--any-count')
    assert re.search(r'1 problem:\n.*input/1.png: Bad CRC', message)
    file.write_bytes(content[:-30])
    assert 'neither a folder nor a zip' in refusal('rain100h', file)
    tar = archive(make_tree(tmp_path / 'more', 'rain100h'), tmp_path / 'data.tar.gz')
    tar.write_bytes(tar.read_bytes()[:-100])
    assert 'cannot be read' in refusal('rain100h', tar)


def test_several_archives_and_split_archives_are_read(tmp_path):
    raw = make_tree(tmp_path / 'raw', 'df2k')
    (first := tmp_path / 'a').mkdir()
    shutil.move(raw / 'Flickr2K', first)
    files = [archive(raw, tmp_path / 'DIV2K_train_HR.zip'), archive(first, tmp_path / 'Flickr2K.tar.gz')]
    arrange('df2k', *files, '--output', tmp_path)
    assert len(stems(tmp_path / 'DF2K' / 'GT_sub')) == 2 * 5 * COUNT
    assert not list((tmp_path / 'DF2K').glob('.*'))


def test_copies_do_not_depend_on_the_download(tmp_path):
    raw = make_tree(tmp_path / 'raw', 'reside6k')
    arrange('reside6k', raw, '--output', tmp_path / 'out', '--copy')
    results = [path for path in (tmp_path / 'out').rglob('*.jpg')]
    assert len(results) == 4 * COUNT and not any(path.is_symlink() for path in results)
    shutil.rmtree(raw)
    assert all(cv2.imread(str(path)) is not None for path in results)


def test_repeated_calls_follow_changed_and_moved_downloads(tmp_path, capsys):
    raw = make_tree(tmp_path / 'raw', 'set14')
    command = ('set14', raw, '--output', tmp_path / 'out')
    arrange(*command)
    made = tmp_path / 'out/Set14/LQ_x4/img_0.png'
    before = made.stat().st_mtime_ns
    arrange(*command)
    assert 'set14.test: already complete, 3 pairs' in capsys.readouterr().out
    assert made.stat().st_mtime_ns == before
    made.unlink()
    arrange(*command)
    assert made.is_file()
    moved = raw.rename(tmp_path / 'moved')  # the links are dangling
    arrange('set14', moved, '--output', tmp_path / 'out')
    assert os.readlink(tmp_path / 'out/Set14/GT/img_0.png') == str(moved / 'Set14/img_0.png')
    (moved / 'Set14/img_0.png').unlink()
    arrange('set14', moved, '--output', tmp_path / 'out', '--copy')
    assert stems(tmp_path / 'out/Set14/GT') == stems(tmp_path / 'out/Set14/LQ_x4') == ['img_1', 'img_2']


def test_a_changed_image_is_not_taken_from_an_unfinished_run(tmp_path):
    raw = make_tree(tmp_path / 'raw', 'set14')
    refusal('set14', raw, '--output', tmp_path / 'out', '--copy')  # the count
    write(raw / 'Set14/img_1.png', 24, 24, 9)
    arrange('set14', raw, '--output', tmp_path / 'out', '--copy')
    for side in ('GT', 'LQ_x4'):
        assert brightness(tmp_path / 'out/Set14' / side / 'img_1.png') == 9


def test_an_interrupted_command_is_continued(tmp_path):
    """Killed midway; finished work is not repeated, and only complete files are visible under their final names."""
    rng = np.random.default_rng(0)
    raw = tmp_path / 'raw' / 'DIV2K_train_HR'
    raw.mkdir(parents=True)
    for number in range(14):
        assert cv2.imwrite(str(raw / f'{number:04}.png'), rng.integers(0, 256, (500, 480, 3), dtype=np.uint8))
    command = ['df2k', str(raw), '--output', str(tmp_path / 'out'), '--part', 'div2k', '--any-count', '--workers', '1']
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *command],
        env=os.environ | {'PYTHONPATH': str(PACKAGE_PARENT), 'OMP_NUM_THREADS': '1'},
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / 'out/.prepared/df2k.div2k.journal'
    deadline = time.monotonic() + 240
    while not (journal.is_file() and journal.read_text().count('\n') >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_text().count('\n') - 1
    assert 4 <= done < 14
    assert not (tmp_path / 'out/DF2K/GT_sub').exists()
    hidden = tmp_path / 'out/DF2K/.GT_sub.df2k.div2k'
    first = {path.name: path.stat().st_mtime_ns for path in sorted(hidden.glob('[!.]*'))}
    assert all(cv2.imread(str(hidden / name)) is not None for name in first)

    with journal.open('a') as file:
        file.write('{"stem": "div2k_00')  # as if killed while writing
    prepare(command)
    tiles = sorted((tmp_path / 'out/DF2K/GT_sub').iterdir())
    kept = sum(first.get(tile.name) == tile.stat().st_mtime_ns for tile in tiles)
    assert 6 * done <= kept < len(tiles)
    assert len(tiles) == 14 * 6 == len(stems(tmp_path / 'out/DF2K/LQ_x4_sub'))
    for tile in tiles[:6]:
        gt, lq = cv2.imread(str(tile)), cv2.imread(str(tmp_path / 'out/DF2K/LQ_x4_sub' / tile.name))
        assert gt.shape[0] == 4 * lq.shape[0] and gt.shape[1] == 4 * lq.shape[1]
    assert [path.name for path in (tmp_path / 'out/DF2K').iterdir() if path.name.startswith('.')] == []


def test_an_interruption_between_the_final_renames_is_continued(tmp_path):
    """The final renames are not one atomic step; a repeated command completes them, another one starts clean."""
    raw = make_tree(tmp_path / 'raw', 'set14')
    for rest in ((), ('--copy',)):
        out = tmp_path / f'out{len(rest)}'
        refusal('set14', raw, '--output', out)  # the count: everything is created, nothing in place
        (out / 'Set14/LQ_x4').mkdir()
        (out / 'Set14/.LQ_x4.set14.test/img_1.png').rename(out / 'Set14/LQ_x4/img_1.png')
        moved = (out / 'Set14/LQ_x4/img_1.png').stat().st_mtime_ns
        arrange('set14', raw, '--output', out, *rest)
        assert stems(out / 'Set14/GT') == stems(out / 'Set14/LQ_x4') == ['img_0', 'img_1', 'img_2']
        assert ((out / 'Set14/LQ_x4/img_1.png').stat().st_mtime_ns == moved) == (not rest)
        assert [path.name for path in (out / 'Set14').glob('.*')] == []


def test_tiles_cover_the_image_and_fit(tmp_path):
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (731, 962, 3), dtype=np.uint8), (0, 0), 2)
    (tmp_path / 'raw/DIV2K_train_HR').mkdir(parents=True)
    assert cv2.imwrite(str(tmp_path / 'raw/DIV2K_train_HR/0001.png'), image)
    arrange('df2k', tmp_path / 'raw', '--output', tmp_path, '--part', 'div2k')
    small = shrink(image)
    assert small.shape == (182, 240, 3)
    basicsr = imresize(image[:728, :960] / 255.0, 0.25) * 255
    assert np.abs(small - basicsr)[2:-2, 2:-2].max() < 1.2  # without rounding in between or at the end
    tops, lefts = (0, 240, 248), (0, 240, 480)
    for number, (top, left) in enumerate([(top, left) for top in tops for left in lefts], 1):
        gt, lq = (
            cv2.imread(str(tmp_path / f'DF2K/{side}/div2k_0001_s{number:03}.png')) for side in ('GT_sub', 'LQ_x4_sub')
        )
        assert np.array_equal(gt, image[top : top + 480, left : left + 480])
        assert np.array_equal(lq, small[top // 4 : top // 4 + 120, left // 4 : left // 4 + 120])
    assert not (tmp_path / 'DF2K/GT_sub/div2k_0001_s010.png').exists()
    assert cv2.imread(str(tmp_path / 'DF2K/GT_sub/div2k_0001T3_s001.png')).shape == (400, 480, 3)
    listed = (tmp_path / 'DF2K_OST/meta_info.txt').read_text().splitlines()
    assert sorted(listed) == listed == [f'DF2K/{path}.png' for path in stems(tmp_path / 'DF2K/GT_sub')]


def test_lmdb_equals_the_folders(tmp_path, capsys):
    raw = make_tree(tmp_path / 'raw', 'lol')
    arrange('lol', raw, '--output', tmp_path, '--part', 'test', '--lmdb')
    folder = tmp_path / ALL / 'test' / 'lowlight'
    opt = {'name': 'x', 'type': 'PairedDegradationDataset', 'phase': 'val', 'scale': 1}
    on_disk = {'dataroot_gt': str(folder / 'GT'), 'dataroot_lq': str(folder / 'LQ')}
    in_lmdb = {key: f'{path}.lmdb' for key, path in on_disk.items()} | {'io_backend': {'type': 'lmdb'}}
    one, other = build_dataset(opt | on_disk), build_dataset(opt | in_lmdb)
    assert len(one) == len(other) == COUNT
    for a, b in zip((one[n] for n in range(COUNT)), (other[n] for n in range(COUNT)), strict=True):
        assert a['lq'].equal(b['lq']) and a['gt'].equal(b['gt'])
    capsys.readouterr()
    arrange('lol', raw, '--output', tmp_path, '--part', 'test', '--lmdb')
    assert capsys.readouterr().out.count('.lmdb is complete') == 2
    arrange('lsrw', make_tree(tmp_path / 'more', 'lsrw'), '--output', tmp_path, '--part', 'test', '--lmdb')
    assert len((folder / 'GT.lmdb/meta_info.txt').read_text().splitlines()) == 2 * COUNT


def test_files_in_the_way_are_named_and_kept(tmp_path):
    raw = make_tree(tmp_path / 'raw', 'rain100h')
    write(tmp_path / 'out/Rain100H/GT/mine.png', 8, 8, 0)
    (tmp_path / f'out/{ALL}/test/rain').mkdir(parents=True)
    message = refusal('rain100h', raw, '--output', tmp_path / 'out', '--any-count')
    assert re.search('GT/mine.png is in the way: not created by this command\n.*test/rain is in the way', message)
    inside = refusal('rain100h', raw, '--output', raw, '--any-count')
    assert 'would be inside the download' in inside


def test_a_custom_subset_is_selected(tmp_path):
    raw = make_tree(tmp_path / 'raw', 'snow100k')
    names = tmp_path / 'names.txt'
    command = ('snow100k', raw, '--output', tmp_path, '--part', 'train', '--subset', names)
    names.write_text('city_02\ncity_09\n')
    assert 'city_09 is in the subset but missing' in refusal(*command, '--any-count')
    names.write_text('city_02\ncity_00\n')
    arrange(*command)
    assert stems(tmp_path / ALL / 'train/snow/LQ') == ['city_00', 'city_02']


def test_spaced_stems_are_evenly_spaced():
    for total, count in ((50000, 5000), (50000, 1000), (7, 3), (3, 3), (2, 3)):
        stems = [f'{n:05}' for n in range(total)]
        chosen = spaced(stems, count)
        assert len(chosen) == min(total, count) and chosen == sorted(set(chosen)) and chosen[0] == '00000'
        gaps = {int(b) - int(a) for a, b in zip(chosen[:-1], chosen[1:], strict=True)}
        assert max(gaps) - min(gaps) <= 1


def test_patterns_match_paths_and_pair_keys():
    assert compile_pattern('train/{key}').fullmatch('/x/Train/a.b (1).PNG')['key'] == 'a.b (1)'
    assert not compile_pattern('train/{key}').fullmatch('/x/my_train/a.png')
    assert not compile_pattern('train/{key}').fullmatch('/x/train/a.txt')
    problems = []
    layout = Layout('gt/{a}', 'lq/{a}-{b}')
    paths = ['x/lq/1-2.png', 'x/lq/1-3.png', 'x/gt/1.png', 'x/gt/2.png', 'x/lq/3-1.png']
    pairs = pair(layout, '{b} {a}', paths, problems)
    assert pairs == {'2_1': ('x/lq/1-2.png', 'x/gt/1.png'), '3_1': ('x/lq/1-3.png', 'x/gt/1.png')}
    assert problems == ['no GT image for x/lq/3-1.png', 'no LQ image for x/gt/2.png']


WRONG = {
    'no such download': (['lol', 'no'], 'no does not exist'),
    'no layout fits': (['lol', '{raw}'], 'lol.test: no images match eval15/low/{key} + eval15/high/{key}; see --part'),
    'an archive of another kind': (['waterlooed', '{raw}/x.rar'], 'neither a folder nor a zip or tar archive'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_downloads_are_explained(case, tmp_path):
    (tmp_path / 'raw').mkdir()
    (tmp_path / 'raw/x.rar').write_bytes(b'Rar!')
    arguments, said = WRONG[case]
    assert said in refusal(*(word.format(raw=tmp_path / 'raw') for word in arguments), '--output', tmp_path / 'out')


MISUSE = {
    'two parts': (['lol', '.', '--layout', 'a/{key}', 'b/{key}'], '--layout and --subset apply to one part'),
    'one pattern': (['rain100h', '.', '--layout', 'a/{key}'], '--layout takes 2 patterns here'),
    'no name': (['waterlooed', '.', '--layout', 'a/b'], 'has no name in braces'),
    'no pattern': (['waterlooed', '.', '--layout', '{key:(}'], "pattern '{key:(}': "),
    'a name is missing': (
        ['gopro', '.', '--part', 'test', '--layout', 'a/{key}', 'b/{key}'],
        'must have key, sequence',
    ),
    'names of GT alone': (['rain100h', '.', '--layout', 'a/{b}', 'b/{key}'], 'must have all names of the GT pattern'),
    'no subset': (
        ['snow100k', '.', '--part', 'train', '--subset', 'no.txt'],
        '--subset: no.txt: No such file or directory',
    ),
    'no workers': (['lol', '.', '--workers', '0'], '--workers must be at least 1'),
}


@pytest.mark.parametrize('case', MISUSE)
def test_misuse_is_explained(case, capsys):
    arguments, said = MISUSE[case]
    assert refusal(*arguments) == '2'
    assert said in capsys.readouterr().err


def test_the_command_prepares_data_for_our_datasets(tmp_path):
    """As users run it, in a folder with `datasets`."""
    file = archive(make_tree(tmp_path / 'raw', 'rain100h'), tmp_path / 'Rain100H.zip')
    done = warm_python(SCRIPT, 'rain100h', file.name, '--any-count', cwd=tmp_path)
    assert done.returncode == 0 and 'rain100h.test: check: 100%' in done.stdout, done.stdout
    assert 'arranged, 3 pairs in datasets/Rain100H/GT and datasets/Rain100H/LQ' in done.stdout
    assert len(stems(tmp_path / 'datasets' / ALL / 'test/rain/LQ')) == COUNT


def test_help_is_printed_for_every_set(capsys):
    for arguments in (['--help'], *([name, '--help'] for name in SETS)):
        assert refusal(*arguments) == '0'
        text = capsys.readouterr().out
    assert 'valid-input-noisy/{key} + valid-gt-clean/{key}' in text and 'inference' in text


REAL = {  # pairs of the published sets, renamed: {folder: (set, part, names in braces of the file names)}
    'rain/Rain100H': ('rain100h', 'test', 'r100h_{key}'),
    'lowlight/LOL-our485': ('lol', 'train', 'lol_{key}'),
    'blur/GoPro': ('gopro', 'test', '{sequence}_{key}'),
    'snow/Snow100K': ('snow100k', 'test', '{size}_{key}'),
    'sr_x4/Set14': ('set14', 'test', 'set14_{key}'),
    'sr_x4/Urban100': ('urban100', 'test', 'urban100_{key}'),
}


@pytest.mark.parametrize('source', REAL)
def test_published_pairs_are_arranged(source, tmp_path):
    folder = SHARED / 'pairs' / source
    if not folder.is_dir():
        pytest.skip(f'no ../shared/data/pairs/{source}: published pairs')
    name, split, files = REAL[source]
    arrange(name, folder, '--part', split, '--output', tmp_path, '--layout', f'GT/{files}', f'LQ/{files}')
    part = SETS[name].parts[split]
    opt = {'dataroot_gt': str(tmp_path / part.gt), 'dataroot_lq': str(tmp_path / part.lq), 'scale': part.scale}
    data = build_dataset(opt | {'name': 'x', 'type': 'PairedDegradationDataset', 'phase': 'val'})
    assert len(data) == len(list((folder / 'GT').iterdir()))
    for item in (data[0], data[len(data) - 1]):
        assert item['gt'].shape[-1] == part.scale * item['lq'].shape[-1]


@pytest.mark.parametrize('name', ['Set5', 'Set14', 'Urban100'])
def test_small_images_match_matlab(name):
    folder = SHARED / 'pairs' / 'sr_x4' / name
    if not folder.is_dir():
        pytest.skip(f'no ../shared/data/pairs/sr_x4/{name}: LQ images made by MATLAB')
    for path in (folder / 'GT').iterdir():
        gt, lq = (cv2.imread(str(folder / side / path.name)) for side in ('GT', 'LQ'))
        assert np.array_equal(shrink(gt), lq), path
