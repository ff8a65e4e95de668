"""Bad data and hostile files end a training with exit status 1 and a message that names the file; nothing hangs."""

import os
import pickle
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from support import forked
from support.forked import Training, changed, train

import dpmambair_basicsr

dpmambair_basicsr.register()
NAMES = [str(index) for index in range(7)]


@pytest.fixture
def images(tmp_path):
    return forked.write_images(tmp_path / 'images')


@pytest.fixture
def opt(images):
    """One batch contains all training images."""
    return changed(forked.options(images), {'datasets.train.batch_size_per_gpu': 7, 'train.total_iter': 2})


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_image(path, shape, kind=np.uint8):
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape, kind))


def write_endless_header(path):
    """A BMP whose header claims 2**30 x 2**30 pixels."""
    _, content = cv2.imencode('.bmp', np.zeros((12, 14, 3), np.uint8))
    content[18:26] = np.array([2**30, 2**30], '<i4').view(np.uint8)
    path.write_bytes(content)


FAULTS = {
    'truncated': cut_short,
    'empty': lambda path: path.write_bytes(b''),
    'no image': lambda path: path.write_text('text'),
    'too many pixels': write_endless_header,
    'of another size': lambda path: write_image(path, (12, 10, 3)),
    'missing': lambda path: path.unlink(),
    'a broken link': lambda path: (path.unlink(), path.symlink_to('nowhere')),
}


def refused(opt, folder, name, *arguments):
    """The last line of the log of a training that fails, which says why."""
    run = Training(opt, folder, *arguments)
    assert run.status(timeout=60) == 1, run.log()
    lines = [line for line in run.log().splitlines() if name in line]
    assert lines, run.log()
    return lines[-1]


@pytest.mark.parametrize('fault', FAULTS)
def test_a_bad_image_is_named(fault, opt, tmp_path):
    file = tmp_path / 'images/lq/3.png'
    FAULTS[fault](file)
    named = file.name if file.is_symlink() else str(file if file.exists() else tmp_path / 'images/gt/3.png')
    message = refused(opt, tmp_path, named)
    assert 'item 3: ' in message or 'no lq image for' in message or 'broken link' in message


def test_wrong_options_are_one_report_and_nothing_is_created(opt, tmp_path):
    changes = {'datasets.train.gt_size': 16, 'train.totl_iter': 3, 'network_g.type': 'TinyNte', 'logger.keep_last': '2'}
    run = Training(changed(opt, changes), tmp_path)
    assert run.status() == 1
    report = run.log().partition(': 4 problems in the options:\n')[2]
    for message in (
        f'datasets.train.gt_size: item 0: {tmp_path}/images/gt/0.png is 14x12, smaller than the crop of 16; set pad',
        'train.totl_iter: unknown key, did you mean total_iter?',
        'network_g.type: unknown type TinyNte, did you mean TinyNet?',
        'logger.keep_last: 2 is text in YAML; write 2',
    ):
        assert f'  {message}' in report, report
    assert not (tmp_path / 'experiments').exists()


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_pairs_of_another_scale_are_refused_before_anything_is_created(phase, opt, tmp_path):
    opt['datasets'][phase] |= forked.write_images(tmp_path / phase)
    write_image(tmp_path / phase / 'gt/0.png', (24, 28, 3))
    message = refused(opt, tmp_path, 'sizes do not match')
    assert f'datasets.{phase}: item 0: sizes do not match at scale 1: lq ' in message
    assert not (tmp_path / 'experiments').exists()


LOADERS = [(2, None, False), (2, None, True), (1, 'cpu', False), (0, 'cpu', False)]


@pytest.mark.parametrize(('workers', 'prefetch', 'persistent'), LOADERS)
def test_a_bad_image_in_a_worker_is_named(opt, tmp_path, workers, prefetch, persistent):
    opt['datasets']['train'] |= {
        'num_worker_per_gpu': workers,
        'prefetch_mode': prefetch,
        'persistent_workers': persistent,
    }
    cut_short(tmp_path / 'images/lq/3.png')
    assert 'item 3: lq image' in refused(opt, tmp_path, str(tmp_path / 'images/lq/3.png'))


def test_a_bad_image_in_a_dataset_of_basicsr_is_named(opt, tmp_path):
    opt['datasets']['train'] |= {'type': 'PairedImageDataset', 'io_backend': {'type': 'disk'}}
    cut_short(tmp_path / 'images/lq/3.png')
    assert 'RuntimeError: item ' in refused(opt, tmp_path, str(tmp_path / 'images/lq/3.png'))


def test_a_bad_image_in_validation_is_named(opt, tmp_path):
    for phase, dataset in opt['datasets'].items():
        dataset |= forked.write_images(tmp_path / phase)
    cut_short(tmp_path / 'val/gt/5.png')
    assert 'item 5: gt image' in refused(opt, tmp_path, str(tmp_path / 'val/gt/5.png'))


def test_unusual_images_and_other_files_do_no_harm(opt, tmp_path):
    folder = tmp_path / 'images/lq'
    write_image(folder / '1.png', (12, 14, 3), np.uint16)
    write_image(folder / '2.png', (12, 14))
    write_image(folder / '3.png', (12, 14, 4))
    (folder / 'Thumbs.db').write_bytes(b'\0')
    (folder / '.hidden.png').write_text('no image')
    (folder / 'folder.png').mkdir()
    train(opt, tmp_path)


@pytest.mark.parametrize('fault', ['not in the database', 'no image in the database'])
def test_a_bad_key_is_named(fault, opt, tmp_path):
    for kind in ('gt', 'lq'):
        if kind == 'lq' and fault.startswith('no image'):
            (tmp_path / 'images/lq/3.png').write_text('text')
        folder = tmp_path / f'{kind}.lmdb'
        source = tmp_path / 'images' / kind
        if fault.startswith('no image'):
            write_lmdb(source, folder)
        else:
            make_lmdb_from_imgs(str(source), str(folder), [f'{name}.png' for name in NAMES], NAMES, map_size=2**22)
            with open(folder / 'meta_info.txt', 'a') as file:
                file.write('no such key.png (12,14,3) 1\n')
        for dataset in opt['datasets'].values():
            dataset |= {f'dataroot_{kind}': str(folder), 'io_backend': {'type': 'lmdb'}}
    opt['datasets']['train']['batch_size_per_gpu'] = 8 - fault.startswith('no image')
    assert 'lq image' in refused(opt, tmp_path, 'image 3 is' if fault.startswith('no image') else 'no such key')


def write_lmdb(source, target):
    """As make_lmdb_from_imgs, which reads the images."""
    import lmdb

    with lmdb.open(str(target), map_size=2**22) as database, database.begin(write=True) as transaction:
        for name in NAMES:
            transaction.put(name.encode(), (source / f'{name}.png').read_bytes())
    (target / 'meta_info.txt').write_text(''.join(f'{name}.png (12,14,3) 1\n' for name in NAMES))


def test_a_killed_worker_ends_training(opt, tmp_path):
    opt = changed(opt, {'datasets.train.num_worker_per_gpu': 1, 'datasets.train.persistent_workers': True})
    opt = changed(opt, {'train.total_iter': 20_000, 'logger.save_checkpoint_freq': 5, 'logger.keep_last': 1})
    run = Training(opt, tmp_path)
    run.wait_for('iter:       6,')
    (worker,) = Path(f'/proc/{run.process.pid}/task/{run.process.pid}/children').read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    start = time.monotonic()
    assert run.status(timeout=60) == 1 and 'killed by signal: Killed' in run.log()
    assert time.monotonic() - start < 30
    train(changed(opt, {'train.total_iter': forked.states(tmp_path)[-1] + 1}), tmp_path, '--auto_resume')


# Hostile files. Options: test_host.py


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch "{self.marker}"',)


@pytest.mark.parametrize('model', ['RestorationModel', 'SRModel'])
@pytest.mark.parametrize('written_by', ['torch', 'pickle'])
def test_a_checkpoint_that_would_run_code_is_refused(model, written_by, opt, tmp_path):
    file, marker = tmp_path / 'attack.pth', tmp_path / 'marker'
    content = {'params': {'weight': Attack(marker)}}
    if written_by == 'torch':
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    opt = changed(opt, {'path.pretrain_network_g': str(file), 'model_type': model})
    run = Training(opt, tmp_path)
    assert run.status() == 1 and not marker.exists()
    torch.load(file, weights_only=False) if written_by == 'torch' else pickle.loads(file.read_bytes())
    assert marker.exists(), 'the attack would work'


DATASETS = {
    'PairedDegradationDataset': {},
    'SyntheticDegradationDataset': {'degradations': ['noise']},
    'PairedImageDataset': {'io_backend': {'type': 'disk'}, 'scale': 1},
    'SingleImageDataset': {'io_backend': {'type': 'disk'}},
}


@pytest.mark.parametrize('kind', DATASETS)
@pytest.mark.parametrize('name', ['../outside.png', '{folder}/outside.png', 'a/../../outside.png', '../gt_too/1.png'])
def test_a_list_of_images_cannot_leave_its_folder(kind, name, opt, tmp_path):
    (tmp_path / 'list.txt').write_text(f'1.png (12,14,3)\n{name.format(folder=tmp_path)} (12,14,3)\n')
    dataset = opt['datasets']['train'] | DATASETS[kind]
    dataset |= {'type': kind, 'meta_info_file': str(tmp_path / 'list.txt'), 'phase': 'train'}
    if kind == 'SingleImageDataset':
        dataset['dataroot_lq'] = dataset.pop('dataroot_gt')
    with pytest.raises(ValueError, match=r'\.png is outside of \S*/images/gt: '):
        build_dataset(dataset)


def test_a_list_of_images_may_name_folders_inside(opt, tmp_path):
    (tmp_path / 'images/gt/more').mkdir()
    for kind in ('gt/more', 'lq'):
        write_image(tmp_path / 'images' / kind / '9.png', (12, 14, 3))
    (tmp_path / 'list.txt').write_text('./1.png (12,14,3)\nmore/9.png (12,14,3)\n')
    dataset = opt['datasets']['train'] | {'meta_info_file': str(tmp_path / 'list.txt'), 'phase': 'train'}
    assert build_dataset(dataset)[1]['gt_path'].endswith('gt/more/9.png')
