import itertools
import json
import logging
import os
import random
import runpy
import sys
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from basicsr.utils.registry import DATASET_REGISTRY
from support.commands import warm_python

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable, and registers the datasets)
from dpmambair_basicsr.data.degradations import DEGRADATIONS, degrade, demo_strengths
from dpmambair_basicsr.data.mixed_degradation_dataset import apportion

ROOT = Path(__file__).parents[1]


def coordinates(height=40, width=48, number=0):
    """RGB uint8 image that encodes positions: red is the row, green the column, blue the image."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([4 * rows, 4 * columns, np.full_like(rows, 20 * number)], axis=2).astype(np.uint8)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


def make_pairs(folder, count=3, darken=2):
    """LQ = GT divided by `darken`, named so that the order on disk differs from the order of names."""
    for number in reversed(range(count)):
        image = coordinates(number=number)
        write(folder / 'GT' / f'photo{number}.png', image)
        write(folder / 'LQ' / f'photo{number}.png', image // darken)
    return {'dataroot_gt': str(folder / 'GT'), 'dataroot_lq': str(folder / 'LQ')}


def paired(tmp_path, **options):
    return {'name': 'Tiny', 'type': 'PairedDegradationDataset', 'phase': 'val'} | make_pairs(tmp_path) | options


def synthetic(tmp_path, **options):
    folder = make_pairs(tmp_path)['dataroot_gt']
    return {'name': 'Tiny', 'type': 'SyntheticDegradationDataset', 'phase': 'val', 'dataroot_gt': folder} | options


def pixels(tensor):
    """(3, h, w) in [0, 1] to (h, w, 3) uint8."""
    return (tensor * 255).round().byte().permute(1, 2, 0).numpy()


def seeded(dataset, index, seed=0):
    random.seed(seed)
    return dataset[index]


# --- paired


def test_paired_items_are_whole_images_in_the_order_of_names(tmp_path):
    dataset = build_dataset(paired(tmp_path, degradation='rain'))
    assert [Path(item['gt_path']).name for item in map(dataset.__getitem__, range(3))] == [
        f'photo{n}.png' for n in range(3)
    ]
    for number in range(3):
        item = dataset[number]
        assert item['gt'].dtype == torch.float32 and item['gt'].shape == (3, 40, 48)
        assert np.array_equal(pixels(item['gt']), coordinates(number=number)), 'RGB expected'
        assert np.array_equal(pixels(item['lq']), coordinates(number=number) // 2)
        assert (item['degradation'], item['label']) == ('rain', 1)
        assert Path(item['lq_path']).parent.name == 'LQ'


def test_without_a_degradation_there_is_no_label(tmp_path):
    item = build_dataset(paired(tmp_path))[0]
    assert item['degradation'] == '' and 'label' not in item


def test_label_is_int64_in_a_batch(tmp_path):
    dataset = build_dataset(paired(tmp_path, degradation='jpeg'))
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=3)))
    assert batch['label'].dtype == torch.int64 and batch['label'].tolist() == [6] * 3
    assert batch['degradation'] == ['jpeg'] * 3


@pytest.mark.parametrize('scale', [1, 2])
def test_crops_and_flips_are_aligned(tmp_path, scale):
    """GT carries its coordinates, LQ is GT shrunk: after any crop and flip the two must still agree."""
    image = coordinates()
    write(tmp_path / 'GT' / 'a.png', image)
    write(tmp_path / 'LQ' / 'a.png', image[::scale, ::scale])
    flips = {'use_hflip': True, 'use_vflip': True, 'use_rot': True}
    dataset = build_dataset(paired(tmp_path / 'unused', phase='train', gt_size=16, scale=scale, **flips) | {
        'dataroot_gt': str(tmp_path / 'GT'), 'dataroot_lq': str(tmp_path / 'LQ')
    })  # fmt: skip
    corners = set()
    for seed in range(40):
        item = seeded(dataset, 0, seed)
        gt, lq = pixels(item['gt']).astype(int), pixels(item['lq']).astype(int)
        assert gt.shape == (16, 16, 3) and lq.shape == (16 // scale, 16 // scale, 3)
        corners.add(tuple(gt[0, 0]))
        blocks = gt.reshape(16 // scale, scale, 16 // scale, scale, 3)
        assert np.array_equal(blocks.min(axis=(1, 3)), lq), 'the first pixel of a block has the smallest coordinates'
    assert len(corners) > 20


@pytest.mark.parametrize(('option', 'changes'), [('use_hflip', 'columns'), ('use_vflip', 'rows')])
def test_each_flip_turns_its_own_axis(tmp_path, option, changes):
    dataset = build_dataset(paired(tmp_path, phase='train', gt_size=16, **{option: True}))
    seen = Counter()
    for seed in range(40):
        item = seeded(dataset, 0, seed)
        gt, lq = pixels(item['gt']).astype(int), pixels(item['lq']).astype(int)
        assert np.array_equal(gt // 2, lq), 'both are flipped, or neither'
        rows, columns = np.sign(gt[1, 0, 0] - gt[0, 0, 0]), np.sign(gt[0, 1, 1] - gt[0, 0, 1])
        seen[int(columns if changes == 'columns' else rows)] += 1
        assert (rows if changes == 'columns' else columns) == 1, 'the other axis is left alone'
    assert seen[1] > 8 and seen[-1] > 8


def test_items_equal_those_of_basicsr(tmp_path):
    """Without our additions, the same seed gives the same items as PairedImageDataset."""
    options = paired(
        tmp_path, phase='train', gt_size=24, scale=1, use_hflip=True, use_rot=True, io_backend={'type': 'disk'}
    )
    ours, theirs = build_dataset(options), build_dataset(options | {'type': 'PairedImageDataset'})
    theirs.paths.sort(key=lambda pair: pair['gt_path'])
    for seed in range(10):
        mine, other = seeded(ours, seed % 3, seed), seeded(theirs, seed % 3, seed)
        assert torch.equal(mine['lq'], other['lq']) and torch.equal(mine['gt'], other['gt'])
        assert mine['lq_path'] == other['lq_path']


def test_a_jpeg_may_pair_with_a_png(tmp_path):
    options = paired(tmp_path, filename_tmpl='{}_q')
    for path in (tmp_path / 'LQ').iterdir():
        path.rename(path.with_name(f'{path.stem}_q.png'))
    write(tmp_path / 'LQ' / 'photo0_q.jpg', coordinates())
    (tmp_path / 'LQ' / 'photo0_q.png').unlink()
    (tmp_path / 'LQ' / 'Thumbs.db').write_bytes(b'not an image')
    dataset = build_dataset(options)
    assert len(dataset) == 3 and dataset[0]['lq_path'].endswith('photo0_q.jpg')


def test_meta_info_file_selects_the_images(tmp_path):
    options = paired(tmp_path)
    (tmp_path / 'list.txt').write_text('photo2.png (40,48,3)\nphoto0.png (40,48,3)\n')
    dataset = build_dataset(options | {'meta_info_file': str(tmp_path / 'list.txt')})
    assert [Path(pair['lq_path']).name for pair in dataset.paths] == ['photo2.png', 'photo0.png']
    assert np.array_equal(pixels(dataset[0]['gt']), coordinates(number=2))
    clean = {
        'type': 'SyntheticDegradationDataset',
        'degradations': ['jpeg'],
        'meta_info_file': str(tmp_path / 'list.txt'),
    }
    assert [Path(path).name for path in build_dataset(options | clean).paths] == ['photo2.png', 'photo0.png']
    (tmp_path / 'list.txt').write_text('')
    for kind in ({}, clean):
        with pytest.raises(ValueError, match=r'no images in \S*/list.txt'):
            build_dataset(options | {'meta_info_file': str(tmp_path / 'list.txt')} | kind)


def make_lmdb(folder):
    names = sorted(path.name for path in folder.iterdir())
    target = folder.with_suffix('.lmdb')
    make_lmdb_from_imgs(str(folder), str(target), names, [Path(name).stem for name in names], map_size=2**22)
    return str(target)


@pytest.mark.parametrize('workers', [0, 1])
def test_lmdb_round_trip(tmp_path, workers):
    options = paired(tmp_path)
    on_disk = build_dataset(options)
    lmdb = {'dataroot_gt': make_lmdb(tmp_path / 'GT'), 'dataroot_lq': make_lmdb(tmp_path / 'LQ')}
    in_lmdb = build_dataset(options | lmdb | {'io_backend': {'type': 'lmdb'}})
    loader = torch.utils.data.DataLoader(in_lmdb, num_workers=workers)
    for number, item in enumerate(loader):
        assert torch.equal(item['lq'][0], on_disk[number]['lq']) and torch.equal(item['gt'][0], on_disk[number]['gt'])
        assert item['gt_path'] == [f'photo{number}']
    clean = synthetic(tmp_path, degradations=['jpeg'])
    a = build_dataset(clean)[1]
    b = build_dataset(clean | {'dataroot_gt': lmdb['dataroot_gt'], 'io_backend': {'type': 'lmdb'}})[1]
    assert torch.equal(a['lq'], b['lq']), 'the storage must not change the degradation'


def test_depth_and_channels(tmp_path):
    """16 bit keeps its precision, grey becomes three channels, alpha is dropped."""
    options = paired(tmp_path)
    deep = coordinates().astype(np.uint16) * 257 + 100
    write(tmp_path / 'GT' / 'photo0.png', deep)
    write(tmp_path / 'GT' / 'photo1.png', coordinates()[..., 1])
    cv2.imwrite(
        str(tmp_path / 'GT' / 'photo2.png'), np.dstack([coordinates()[..., ::-1], np.full((40, 48), 9, np.uint8)])
    )
    dataset = build_dataset(options)
    np.testing.assert_allclose(dataset[0]['gt'].permute(1, 2, 0).numpy() * 65535, deep, rtol=1e-6)
    assert np.array_equal(pixels(dataset[1]['gt']), np.dstack([coordinates()[..., 1]] * 3))
    assert np.array_equal(pixels(dataset[2]['gt']), coordinates())


# --- errors in the data name the file


def spoil(path, how):
    data = path.read_bytes()
    path.write_bytes({'truncated': data[: len(data) // 2], 'text': b'hello', 'empty': b''}[how])


@pytest.mark.parametrize(
    ('how', 'role', 'workers'),
    [*itertools.product(['truncated', 'text', 'empty'], ['LQ', 'GT'], [0]), ('truncated', 'LQ', 1)],
)
def test_broken_images_are_named(tmp_path, how, role, workers):
    dataset = build_dataset(paired(tmp_path))
    spoil(tmp_path / role / 'photo1.png', how)
    with pytest.raises(ValueError, match=rf'item 1: {role.lower()} image \S*{role}/photo1.png is .* truncated'):
        list(torch.utils.data.DataLoader(dataset, num_workers=workers))


def test_broken_jpeg_files_are_named(tmp_path):
    options = paired(tmp_path)
    for path in (tmp_path / 'LQ').iterdir():
        write(path.with_suffix('.jpg'), coordinates())
        path.unlink()
    spoil(tmp_path / 'LQ' / 'photo2.jpg', 'truncated')
    with pytest.raises(ValueError, match=r'item 2: lq image \S*photo2.jpg'):
        build_dataset(options)[2]


def test_images_deleted_after_the_start_are_named(tmp_path):
    dataset = build_dataset(paired(tmp_path))
    (tmp_path / 'LQ' / 'photo2.png').unlink()
    with pytest.raises(OSError, match=r'item 2: cannot read lq image \S*LQ/photo2.png: No such file'):
        dataset[2]


def test_unknown_lmdb_keys_are_named(tmp_path):
    options = paired(tmp_path)
    folders = {'dataroot_gt': make_lmdb(tmp_path / 'GT'), 'dataroot_lq': make_lmdb(tmp_path / 'LQ')}
    for folder in folders.values():
        with open(Path(folder, 'meta_info.txt'), 'a') as file:
            file.write('photo9.png (40,48,3) 1\n')
    with pytest.raises(ValueError, match='item 3: lq image photo9 is missing'):
        build_dataset(options | folders | {'io_backend': {'type': 'lmdb'}})[3]


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_mismatched_sizes_are_named(tmp_path, phase):
    dataset = build_dataset(paired(tmp_path, phase=phase, gt_size=16))
    write(tmp_path / 'GT' / 'photo1.png', coordinates(height=41))
    with pytest.raises(ValueError, match=r'item 1: .*LQ/photo1.png is 48x40, gt \S*GT/photo1.png is 48x41'):
        dataset[1]


def test_gt_smaller_than_the_crop_is_refused_or_padded(tmp_path):
    for options in (paired(tmp_path), synthetic(tmp_path, degradations=['noise'])):
        dataset = build_dataset(options | {'phase': 'train', 'gt_size': 41})
        with pytest.raises(
            ValueError, match=r'item 0: \S*GT/photo0.png is 48x40, smaller than the crop of 41; set pad_small'
        ):
            dataset[0]
        item = build_dataset(options | {'phase': 'train', 'gt_size': 52, 'pad_small': True})[0]
        expected = np.pad(coordinates(), ((0, 12), (0, 4), (0, 0)), mode='symmetric')
        assert np.array_equal(pixels(item['gt']), expected) and item['lq'].shape == (3, 52, 52)


def test_padding_keeps_lq_and_gt_aligned(tmp_path):
    options = paired(tmp_path, phase='train', gt_size=56, scale=2, pad_small=True)
    for number in range(3):
        write(tmp_path / 'GT' / f'photo{number}.png', coordinates().repeat(2, axis=0).repeat(2, axis=1))
        write(tmp_path / 'LQ' / f'photo{number}.png', coordinates())
    item = seeded(build_dataset(options | {'gt_size': 90}), 0)
    assert torch.equal(item['gt'], item['lq'].repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_at_scale_2_an_odd_gt_loses_its_last_row(tmp_path):
    options = paired(tmp_path, scale=2)
    for number in range(3):
        write(tmp_path / 'GT' / f'photo{number}.png', coordinates(81, 96))
    assert build_dataset(options)[0]['gt'].shape == (3, 80, 96)


def test_images_without_partners_are_named(tmp_path):
    options = paired(tmp_path)
    (tmp_path / 'GT' / 'photo1.png').rename(tmp_path / 'GT' / 'other.png')
    message = r'do not pair .*: no lq image for \S*/GT/other.png; no gt image for \S*/LQ/photo1.png'
    with pytest.raises(ValueError, match=message):
        build_dataset(options)
    for number in range(5):
        write(tmp_path / 'LQ' / f'more{number}.png', coordinates())
    with pytest.raises(ValueError, match=r'no gt image for \S*more0.png, \S*more1.png, \S*more2.png and 3 more'):
        build_dataset(options)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'degradation': 'fog'}, "degradation must be one of haze, rain, .*, composed, got 'fog'"),
        ({'dataroot_lq': None}, 'dataset Tiny: dataroot_lq must be a path'),
        ({'phase': 'training'}, "phase must be one of train, val, test, got 'training'"),
        ({'phase': 'train'}, 'gt_size must be a positive multiple of scale 1, got None'),
        ({'phase': 'train', 'gt_size': 33, 'scale': 2}, 'gt_size must be a positive multiple of scale 2, got 33'),
        ({'mean': [0.5, 0.5, 0.5]}, 'mean is not supported'),
    ],
)
def test_invalid_options_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(paired(tmp_path) | change)


def test_missing_empty_and_ambiguous_folders_are_refused(tmp_path):
    options = paired(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'image folder \S*/nowhere does not exist'):
        build_dataset(options | {'dataroot_lq': str(tmp_path / 'nowhere')})
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match=r'no image in folder \S*/empty'):
        build_dataset(options | {'dataroot_gt': str(tmp_path / 'empty')})
    write(tmp_path / 'GT' / 'photo0.jpg', coordinates())
    with pytest.raises(ValueError, match='two images of the same name: photo0.jpg and photo0.png'):
        build_dataset(options)


# --- synthetic


def test_validation_has_every_image_in_every_kind(tmp_path):
    dataset = build_dataset(synthetic(tmp_path, degradations=['noise', 'jpeg']))
    items = [dataset[index] for index in range(len(dataset))]
    expected = [(f'photo{number}', kind) for number in range(3) for kind in ('noise', 'jpeg')]
    assert [(Path(item['gt_path']).stem, item['degradation']) for item in items] == expected
    assert [Path(item['lq_path']).name for item in items] == [f'{stem}_{kind}.png' for stem, kind in expected]
    for item in items:
        assert item['label'] == DEGRADATIONS[item['degradation']].label
        levels = item['lq'] * 255
        assert torch.allclose(levels, levels.round(), atol=1e-4), 'lq has 8 bit values'
        assert (levels - item['gt'] * 255).abs().mean() > (0.5 if item['degradation'] == 'jpeg' else 5)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_training_scenes_can_be_darker_in_both_images(tmp_path):
    options = synthetic(tmp_path, phase='train', gt_size=16, degradations=['clean'])
    plain, darker = (seeded(build_dataset(options | more), 0) for more in ({}, {'gt_gamma': [2, 2]}))
    assert torch.allclose(darker['gt'], plain['gt'] ** 2, atol=0.51 / 255)
    assert torch.equal(darker['lq'], darker['gt'])
    with pytest.raises(ValueError, match=r'^gt_gamma must be \[low, high\], within'):
        build_dataset(options | {'gt_gamma': [2, 1]})


def test_validation_is_the_same_in_every_run_and_process(tmp_path):
    options = synthetic(tmp_path, degradations=list(DEGRADATIONS))
    dataset = build_dataset(options)
    direct = [seeded(dataset, index, seed=index)['lq'] for index in range(len(dataset))]
    loader = torch.utils.data.DataLoader(build_dataset(options), num_workers=2)
    assert all(torch.equal(item['lq'][0], lq) for item, lq in zip(loader, direct, strict=True))
    code = (
        'import json, sys, zlib, dpmambair_basicsr.data; from basicsr.data import build_dataset;'
        'dataset = build_dataset(json.loads(sys.argv[1]));'
        'print([zlib.crc32(dataset[index]["lq"].numpy().tobytes()) for index in range(len(dataset))])'
    )
    other = warm_python('-c', code, json.dumps(options), cwd=tmp_path)
    assert other.returncode == 0, other.stdout
    assert json.loads(other.stdout.splitlines()[-1]) == [zlib.crc32(lq.numpy().tobytes()) for lq in direct]


def test_validation_depends_on_seed_and_name_not_on_the_other_images(tmp_path):
    options = synthetic(tmp_path, degradations={'noise': {'sigma': 20}})
    first = build_dataset(options)[1]
    assert not torch.equal(first['lq'], build_dataset(options | {'seed': 1})[1]['lq'])
    assert first['lq_path'] == first['gt_path'], 'one kind: BasicSR may keep the name'
    (tmp_path / 'GT' / 'photo0.png').unlink()
    assert torch.equal(first['lq'], build_dataset(options)[0]['lq'])


def test_the_seed_is_that_of_the_names_bytes_which_need_not_be_utf_8(tmp_path):
    options = synthetic(tmp_path, degradations=['noise'])
    folder = Path(options['dataroot_gt'])
    (folder / 'photo0.png').rename(os.fsdecode(os.fsencode(folder) + b'/caf\xe9.png'))
    for item, name in zip(build_dataset(options), (b'caf\xe9', b'photo1', b'photo2'), strict=True):
        rng = np.random.default_rng([0, zlib.crc32(name), DEGRADATIONS['noise'].label])
        expected = degrade(item['gt'].permute(1, 2, 0).numpy(), 'noise', rng)
        assert np.abs(item['lq'].permute(1, 2, 0).numpy() - expected).max() <= 0.51 / 255


def test_training_draws_crops_flips_and_kinds(tmp_path):
    options = synthetic(tmp_path, phase='train', gt_size=16, use_hflip=True, use_vflip=True)
    dataset = build_dataset(
        options | {'degradations': {'lowlight': {'sigma': 0, 'variation': 0}, 'noise': {'sigma': [1, 2]}}}
    )
    assert len(dataset) == 3
    random.seed(0)
    epochs = [[dataset[index] for index in range(3)] for _ in range(12)]
    kinds = Counter(item['degradation'] for epoch in epochs for item in epoch)
    assert min(kinds['lowlight'], kinds['noise']) > 8
    assert len({epoch[0]['gt'].numpy().tobytes() for epoch in epochs}) > 9, 'crops differ between epochs'
    for item in (item for epoch in epochs for item in epoch):
        assert item['gt'].shape == item['lq'].shape == (3, 16, 16)
        if item['degradation'] == 'noise':
            assert (item['lq'] - item['gt']).abs().max() < 12 / 255, 'lq and gt show the same crop'
        else:
            brightness = item['lq'] / item['gt'].clamp(min=0.2)
            assert brightness[item['gt'] > 0.2].std() < 0.02
    again = build_dataset(dataset.opt)
    random.seed(0)
    assert all(torch.equal(again[index]['lq'], epochs[0][index]['lq']) for index in range(3)), 'random.seed decides all'


def test_the_value_demo_stands_for_the_strengths_of_the_demo(tmp_path):
    def first_images(degradations):
        dataset = build_dataset(synthetic(tmp_path, degradations=degradations))
        return {item['degradation']: item['lq'] for item in map(dataset.__getitem__, range(len(dataset.kinds)))}

    numbers, demo = first_images(demo_strengths()), first_images('demo')
    assert list(numbers) == list(demo) and all(torch.equal(numbers[kind], demo[kind]) for kind in numbers)
    some = first_images({'noise': 'demo', 'haze': {}})
    assert torch.equal(some['noise'], demo['noise']) and not torch.equal(some['haze'], demo['haze'])


def test_training_items_are_crops_of_degraded_images(tmp_path):
    """Not degraded crops: haze thickens over the whole scene, so a quarter of its height shows part of that."""
    write(tmp_path / 'grey' / 'grey.png', np.full((64, 64, 3), 128, np.uint8))
    degradations = {'haze': {'beta': 1.5, 'airlight': 1.0}}
    options = synthetic(tmp_path, degradations=degradations) | {'dataroot_gt': str(tmp_path / 'grey')}
    whole, crops = build_dataset(options), build_dataset(options | {'phase': 'train', 'gt_size': 16})

    def span(item):
        rows = item['lq'].mean(dim=(0, 2))
        return (rows.max() - rows.min()).item()

    random.seed(0)
    assert np.mean([span(crops[0]) for _ in range(20)]) < 0.6 * span(whole[0])


def test_training_noise_differs_where_the_crop_does_not(tmp_path):
    dataset = build_dataset(synthetic(tmp_path, phase='train', gt_size=40, degradations=['noise']))
    items = [dataset[0] for _ in range(30)]
    same_crop = [item['lq'] for item in items if torch.equal(item['gt'], items[0]['gt'])]
    assert len(same_crop) > 1 and not any(torch.equal(same_crop[0], lq) for lq in same_crop[1:])


@pytest.mark.parametrize(
    ('degradations', 'message'),
    [
        (None, 'degradations must name some of haze, rain'),
        ({'fog': 'demo'}, 'degradations, fog: not in the demo, choose from haze, rain'),
        ([], 'degradations must name some of'),
        (['noise', 'noise', 'rain'], 'degradations, noise: listed more than once; all kinds are drawn equally often'),
        (['noise', 'fog'], "degradations, fog: unknown degradation 'fog', choose from haze"),
        ({'noise': {'sgima': 20}}, "degradations, noise: .* no parameter 'sgima', choose from sigma"),
        ({'jpeg': {'quality': [0, 20]}}, 'degradations, jpeg: quality: expected int'),
    ],
)
def test_invalid_degradations_fail_at_the_start(tmp_path, degradations, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(synthetic(tmp_path, degradations=degradations))


# --- mixed


def mixed(tmp_path, sampling='concat', phase='train', **options):
    sets = {name: make_pairs(tmp_path / name, count) for name, count in (('haze', 2), ('rain', 5), ('lol', 3))}
    sets['lol']['degradation'] = 'lowlight'
    sets['jpeg'] = {
        'type': 'SyntheticDegradationDataset',
        'dataroot_gt': sets['haze']['dataroot_gt'],
        'degradations': ['jpeg'],
    }
    defaults = {'name': 'Mix', 'type': 'MixedDegradationDataset', 'phase': phase, 'gt_size': 16, 'use_hflip': True}
    return defaults | {'datasets': sets, 'sampling': sampling} | options


def test_concat_has_every_image_once(tmp_path):
    dataset = build_dataset(mixed(tmp_path))
    items = [dataset[index] for index in range(len(dataset))]
    assert len(items) == 12 and len({(item['degradation'], item['gt_path']) for item in items}) == 12
    assert Counter(item['label'] for item in items) == {0: 2, 1: 5, 3: 3, 6: 2}
    assert all(item['gt'].shape == (3, 16, 16) for item in items), 'gt_size is inherited'
    batch = torch.utils.data.default_collate(items)
    assert batch['label'].dtype == torch.int64


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_folders_of_any_name_are_a_set_without_labels(tmp_path, phase, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    sets = {name: make_pairs(tmp_path / name, count) for name, count in (('camera 1', 2), ('hase', 3))}
    options = mixed(tmp_path / 'others', phase=phase) | {'datasets': sets}
    with caplog.at_level('INFO', 'basicsr'):
        dataset = build_dataset(options)
    unknown = 'camera 1 (did you mean camera_noise?), hase (did you mean haze?).'
    assert f'no labels; not of a known degradation: {unknown}' in caplog.text
    assert len({dataset[index]['gt_path'] for index in range(5)}) == 5
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=5 if phase == 'train' else 1)))
    assert 'label' not in batch and set(batch['degradation']) == {''}


def test_labels_are_given_by_all_sub_datasets_or_none(tmp_path):
    """Items of a batch have the same keys."""
    options = mixed(tmp_path)
    options['datasets']['camera'] = make_pairs(tmp_path / 'camera', 2)
    dataset = build_dataset(options)
    batch = torch.utils.data.default_collate([dataset[index] for index in range(len(dataset))])
    assert 'label' not in batch
    assert Counter(batch['degradation']) == {'haze': 2, 'rain': 5, 'lowlight': 3, 'jpeg': 2, '': 2}


@pytest.mark.parametrize(
    ('sampling', 'expected'),
    [
        ('uniform', {'haze': 3, 'rain': 3, 'lowlight': 3, 'jpeg': 3}),
        ({'haze': 1, 'rain': 6, 'lol': 1, 'jpeg': 4}, {'haze': 1, 'rain': 6, 'lowlight': 1, 'jpeg': 4}),
    ],
)
def test_proportions_are_exact_over_an_epoch(tmp_path, sampling, expected):
    dataset = build_dataset(mixed(tmp_path, sampling))
    assert Counter(dataset[index]['degradation'] for index in range(len(dataset))) == expected
    for epoch in range(2):
        sampler = EnlargedSampler(dataset, num_replicas=1, rank=0, ratio=3)
        sampler.set_epoch(epoch)
        counts = Counter(dataset[index]['degradation'] for index in sampler)
        assert counts == {name: 3 * count for name, count in expected.items()}


def test_construction_leaves_basicsrs_log_closed(tmp_path, monkeypatch):
    """Building a dataset before BasicSR opens its log (to check options) must not prevent the run's log file."""
    opened = {}
    monkeypatch.setattr('basicsr.utils.logger.initialized_logger', opened)
    for options in (mixed(tmp_path, 'uniform'), paired(tmp_path), synthetic(tmp_path, degradations=['noise'])):
        DATASET_REGISTRY.get(options['type'])(options)
    assert not opened


def test_weighted_draws_reach_every_image(tmp_path):
    dataset = build_dataset(mixed(tmp_path, 'uniform'))
    random.seed(0)
    seen = {dataset[index]['gt_path'] for _ in range(8) for index in range(len(dataset))}
    assert len(seen) == 10  # the synthetic set shares haze's two images


def test_apportioned_counts_add_up_and_are_off_by_less_than_one():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [0.5, 0.5, 6]) == [1, 0, 6]
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.uniform(0.1, 5, rng.integers(1, 8))
        total = int(rng.integers(1, 1000))
        counts = np.array(apportion(total, weights.tolist()))
        assert counts.sum() == total and np.abs(counts - total * weights / weights.sum()).max() < 1


def test_mixed_validation_has_unique_names(tmp_path):
    dataset = build_dataset(mixed(tmp_path, phase='val'))
    names = [Path(dataset[index]['lq_path']).stem for index in range(len(dataset))]
    assert len(set(names)) == 12 and {'haze_photo0', 'lol_photo0', 'jpeg_photo0'} <= set(names)
    with pytest.raises(ValueError, match="sampling must be concat outside training, got 'uniform'"):
        build_dataset(mixed(tmp_path, 'uniform', phase='val'))


def test_mixtures_keep_their_shares_in_basicsrs_loader(tmp_path):
    """With workers, as in training; the shares hold for the items that the loader delivers."""
    options = mixed(tmp_path, 'uniform') | {'batch_size_per_gpu': 4, 'num_worker_per_gpu': 1}
    dataset = build_dataset(options)
    loader = build_dataloader(dataset, options, num_gpu=1, sampler=EnlargedSampler(dataset, 1, 0, 2), seed=0)
    batches = list(loader)
    assert len(batches) == 6
    assert Counter(name for batch in batches for name in batch['degradation']) == dict.fromkeys(
        ['haze', 'rain', 'lowlight', 'jpeg'], 6
    )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'sampling': 'balanced'}, "sampling must be concat, uniform or weights by name, got 'balanced'"),
        ({'sampling': {'haze': 1, 'rain': 1}}, 'sampling must weigh haze, rain, lol, jpeg, got haze, rain'),
        (
            {'sampling': {'haze': 1, 'rain': 0, 'lol': 1, 'jpeg': 1}},
            'sampling, rain: the weight must be positive, got 0',
        ),
        ({'datasets': None}, 'datasets must map names to options'),
        ({'datasets': {'haze': {'type': 'Nope'}}}, "datasets, haze: type must be one of Paired.*, got 'Nope'"),
        ({'datasets': {'haze': {'dataroot': 'x'}}}, "datasets, haze: unknown key 'dataroot', choose from dataroot_gt"),
        (
            {'datasets': {'lol': {'dataroot_gt': 'a', 'dataroot_lq': 'b', 'degradation': 'lol'}}},
            "degradation must be one of .* got 'lol'",
        ),
    ],
)
def test_invalid_mixtures_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(mixed(tmp_path) | change)


def test_home_is_expanded_in_sub_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    options = mixed(tmp_path)
    for sub in options['datasets'].values():
        for key in ('dataroot_gt', 'dataroot_lq'):
            if key in sub:
                sub[key] = sub[key].replace(str(tmp_path), '~')
    assert len(build_dataset(options)) == 12


@pytest.mark.parametrize('workers', [0, 1])
def test_progressive_sizes_reach_the_sub_datasets(tmp_path, workers):
    """Crop and batch sizes reach the sub-datasets, paired and synthetic."""
    options = mixed(tmp_path, 'uniform', gt_size=32) | {'batch_size_per_gpu': 4, 'num_worker_per_gpu': workers}
    options['progressive'] = {'gt_sizes': [16, 32], 'batch_sizes': [4, 2], 'iters': [2, 10]}
    dataset = build_dataset(options)
    loader = build_dataloader(dataset, options, num_gpu=1, sampler=EnlargedSampler(dataset, 1, 0), seed=0)
    assert [tuple(batch['gt'].shape) for batch in loader] == [(4, 3, 16, 16), (4, 3, 16, 16), (2, 3, 32, 32)]


# --- the demo data


def test_demo_data_is_reproducible_and_kept(tmp_path, monkeypatch, capsys):
    pytest.importorskip('skimage')
    pytest.importorskip('sklearn')
    script = ROOT / 'scripts' / 'make_demo_data.py'
    first = warm_python(script, '--size', '64', '--output', tmp_path / 'a/demo', cwd=ROOT)
    assert first.returncode == 0, first.stdout

    def make(folder):
        monkeypatch.setattr(sys, 'argv', [str(script), '--size', '64', '--output', str(folder)])
        runpy.run_path(str(script), run_name='__main__')
        return capsys.readouterr().out

    make(tmp_path / 'b')
    assert 'haze' in first.stdout and 'PSNR' in first.stdout
    demo = tmp_path / 'a' / 'demo'
    files = sorted(path.relative_to(demo) for path in demo.rglob('*') if path.is_file())
    assert all((demo / name).read_bytes() == (tmp_path / 'b' / name).read_bytes() for name in files), (
        'not deterministic'
    )
    assert sorted(path.name for path in demo.parent.iterdir()) == ['demo'], 'a temporary folder is left'

    for kind in demo_strengths():
        folder = demo / 'test' / kind
        roots = {'dataroot_lq': str(folder / 'LQ'), 'dataroot_gt': str(folder / 'GT')}
        dataset = build_dataset(
            {'name': kind, 'type': 'PairedDegradationDataset', 'phase': 'val', 'degradation': kind} | roots
        )
        assert len(dataset) == 3 and all(dataset[n]['lq'].shape == (3, 64, 64) for n in range(3))
    training = {name.stem.rsplit('_', 2)[0] for name in files if name.parts[:2] == ('train', 'clean')}
    assert len(training) > 8 and not training & {name.stem for name in files if name.parts[0] == 'test'}

    stamp = (demo / 'demo.json').stat().st_mtime_ns
    assert 'is complete' in make(demo) and (demo / 'demo.json').stat().st_mtime_ns == stamp
    (demo / files[-1]).unlink()
    assert 'is complete' not in make(demo) and (demo / files[-1]).is_file()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('x')
    with pytest.raises(SystemExit, match='was not created by this script'):
        make(tmp_path / 'mine')
    assert (tmp_path / 'mine' / 'thesis.txt').is_file()
