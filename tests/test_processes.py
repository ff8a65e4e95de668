"""Training in several processes equals one process, and fails in bounded time if one of them ends.

A process that is stopped or missing is named within half a minute; the others do not wait forever.
"""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support import forked
from support.forked import Training, changed, start_processes, states, train
from support.programs import TORCHRUN, children, training
from test_checkpoints import assert_ends_like
from test_exact_resume import GAN, real_world, train_in_two_processes

TOTAL = 6  # iterations
LONG = {'train.total_iter': 200_000, 'logger.save_checkpoint_freq': 5, 'logger.keep_last': 2}
# With gradients near zero, the steps of adaptive optimizers depend on rounding.
SGD = {'type': 'SGD', 'lr': 0.05}
AUTOENCODER = {
    'type': 'DegradationAutoencoder', 'embed_dim': 4, 'extractor_channels': [4, 4], 'channels': 4,
    'num_fusion_blocks': 1, 'num_refine_blocks': 1,
}  # fmt: skip
KINDS = {
    'RestorationModel': {'train.grad_clip_norm': 0.05},
    'DegradationExtractorModel': {'network_g': AUTOENCODER},
    'RestorationGANModel': GAN | {'train.optim_d': SGD},
    'RealWorldSRModel': {},
    'RealWorldSRGANModel': GAN | {'train.optim_d': SGD},
}


def plain_photos(folder):
    """Options of a training without randomness: every crop and blur of a uniformly coloured photo is the same.

    Without resizing, all sizes are multiples of JPEG's blocks; JPEG's quality is constant, and noise is off.
    """
    opt = real_world(folder)
    rng = np.random.default_rng(0)
    for index in range(8):
        photo = np.full((401, 401, 3), rng.integers(30, 225, 3), np.uint8)
        assert cv2.imwrite(str(folder / 'photos' / f'{index}.png'), photo)
    (folder / 'photos' / 'meta_info.txt').write_text(''.join(f'{index}.png (401,401,3)\n' for index in range(8)))
    fixed = {'resize_prob': [0, 0, 1], 'gaussian_noise_prob': 1, 'noise_range': [0, 0], 'jpeg_range': [90, 90]}
    opt = changed(opt, {f'{key}{order}': value for key, value in fixed.items() for order in ('', '2')})
    return changed(opt, {'scale': 1, 'network_g': {'type': 'TinyNet'}})


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return forked.write_images(tmp_path_factory.mktemp('images') / 'images', count=8)


# Trainings of two processes of which one is stopped or missing; all of them wait while other tests run.

LIMIT = 30  # seconds
NODE = os.uname().nodename
SILENT = 'no sign of life for 15 s. The others wait; dist_params.timeout ends it '


@pytest.fixture(scope='module')
def waiting_in(tmp_path_factory):
    return tmp_path_factory.mktemp('waiting')


@pytest.fixture(scope='module')
def waiting(images, waiting_in):
    """(rank, name) -> the process."""
    opt, found = changed(forked.options(images), LONG | {'val.val_freq': 100_000}), {}
    limited = changed(opt, {'dist_params': {'timeout': LIMIT}})
    for stopped, name in ((0, 'first stopped'), (1, 'second stopped'), (1, 'paused')):
        runs = start_processes(opt if name == 'paused' else limited, waiting_in / name)
        runs[0].wait_for('iter:       6,')
        os.kill(runs[stopped].process.pid, signal.SIGSTOP)
        found |= {(rank, name): run for rank, run in enumerate(runs)}
    for rank, name in ((1, 'first missing'), (0, 'second missing')):
        environment = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(forked.free_port()), 'WORLD_SIZE': '2'}
        environment |= {'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        found[rank, name] = Training(limited, waiting_in / name, '--launcher', 'pytorch', environment=environment)
    yield found
    for run in found.values():
        run.process.kill()


@pytest.mark.usefixtures('waiting')
@pytest.mark.parametrize('kind', KINDS)
def test_two_processes_equal_one_with_the_doubled_batch(kind, images, tmp_path):
    is_real_world = kind.startswith('RealWorld')
    opt = plain_photos(tmp_path) if is_real_world else forked.options(images)
    common = {'network_g.dropout': 0.0, 'train.optim_g': SGD, 'train.total_iter': TOTAL}
    opt = changed(changed(opt, common), KINDS[kind] | {'model_type': kind})

    folders = [tmp_path / name for name in ('two', 'one', 'half')]
    runs = train_in_two_processes, train, train
    for folder, run, size in zip(folders, runs, (2, 4, 2), strict=True):
        # A pool of one batch delays the batches by an iteration without mixing them.
        pool = {'queue_size': size} if is_real_world else {}
        run(changed(opt, {'datasets.train.batch_size_per_gpu': size} | pool), folder)
    two, one, half = (weights(folder) for folder in folders)
    assert len(two) == (3 if 'network_d' in opt else 2)
    for key in two:
        rounding, another_batch = distance(two[key], one[key]), distance(two[key], half[key])
        assert rounding < 0.01 * another_batch, key


def weights(folder, name='latest'):
    """Vectors of all parameters: of the network, its EMA and the discriminator."""
    files = {part: folder / f'experiments/run/models/net_{part}_{name}.pth' for part in 'gd'}
    found = {part: torch.load(file, weights_only=True) for part, file in files.items() if file.exists()}
    return {
        (part, key): torch.cat([value.flatten() for value in content[key].values() if value.is_floating_point()])
        for part, content in found.items()
        for key in ('params', 'params_ema')
        if key in content
    }


def distance(one, other):
    return (one - other).norm().item()


def in_folders_of_their_own(tmp_path, images):
    """Working directories: two as on two nodes, one for comparison; data and runs have the same names in each."""
    folders = [tmp_path / name for name in ('first', 'second', 'alone')]
    for folder in folders:
        folder.mkdir()
        shutil.copytree(Path(images['dataroot_gt']).parent, folder / 'images')
        shutil.copytree(Path(images['dataroot_gt']).parent, folder / 'val images')
    opt = forked.options({'dataroot_gt': 'images/gt', 'dataroot_lq': 'images/lq'})
    val = {'datasets.val.dataroot_gt': 'val images/gt', 'datasets.val.dataroot_lq': 'val images/lq'}
    return changed(opt, val), folders[:2], folders[2]


def test_validation_of_a_network_with_buffers_and_without_average_does_not_hang(images, tmp_path):
    """Only the first process validates, whatever the others see; BasicSR's validation would hang."""
    opt, (first, second), alone = in_folders_of_their_own(tmp_path, images)
    for kind in ('gt', 'lq'):
        for index in range(5):
            (second / 'val images' / kind / f'{index}.png').unlink()
    changes = {'train.ema_decay': 0, 'train.total_iter': TOTAL, 'train.optim_g': SGD, 'network_g.dropout': 0.0}
    opt = changed(opt, changes)
    runs = start_processes(opt, [first, second])
    assert [run.status() for run in runs] == [0, 0], runs[0].log() + runs[1].log()
    assert runs[0].log().count('Validation val set\n') == 4 and 'Validation' not in runs[1].log()
    train(changed(opt, {'datasets.train.batch_size_per_gpu': 4}), alone)
    (two,), (one,), (early,) = weights(first).values(), weights(alone).values(), weights(first, 2).values()
    assert distance(two, one) < 1e-3 * distance(two, early), 'the processes have continued together'


def test_processes_that_see_other_images_end_at_once(images, tmp_path):
    opt, folders, _ = in_folders_of_their_own(tmp_path, images)
    for kind in ('gt', 'lq'):
        (folders[1] / 'images' / kind / '7.png').unlink()
    for run in start_processes(opt, folders):
        assert run.status(timeout=60) == 1
        assert 'The processes disagree on items: 8, 7. ' in run.log().splitlines()[-1]


def test_processes_that_see_other_checkpoints_end_at_once(images, tmp_path):
    opt, folders, _ = in_folders_of_their_own(tmp_path, images)
    train(changed(opt, {'train.total_iter': 2}), folders[0])
    for run in start_processes(opt, folders, '--auto_resume'):
        assert run.status(timeout=60) == 1
        assert 'The processes disagree on iterations done: 2, 0. ' in run.log().splitlines()[-1]
    assert states(folders[0]) == [2]


def test_a_bad_image_of_one_process_ends_both(images, tmp_path):
    opt, folders, _ = in_folders_of_their_own(tmp_path, images)
    for file in (folders[1] / 'images/lq').iterdir():
        file.write_text('no image')
    first, second = start_processes(opt, folders)
    assert second.status(timeout=60) == 1
    assert re.search(r'item \d: lq image images/lq/\d.png is .* truncated', second.log())
    assert first.status(timeout=60) == 1


@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_process_ends_the_other(rank, images, tmp_path):
    opt = changed(forked.options(images), LONG)
    runs = start_processes(opt, tmp_path)
    runs[0].wait_for('iter:       6,')
    runs[rank].process.kill()
    start = time.monotonic()
    assert runs[rank].status() == -signal.SIGKILL
    assert runs[1 - rank].status(timeout=60) == 1, runs[1 - rank].log()
    assert time.monotonic() - start < 30
    opt = changed(opt, {'train.total_iter': states(tmp_path)[-1] + 5})
    assert_ends_like(opt, tmp_path, tmp_path / 'straight', train=train_in_two_processes)


def test_torchrun_ends_all_if_one_is_killed(images, tmp_path):
    """Stopping all of them: test_stopping.py."""
    with training(TORCHRUN, changed(forked.options(images), LONG | {'val.val_freq': 1000}), tmp_path) as (run, log):
        os.kill(children(run.pid)[-1], signal.SIGKILL)
        assert run.wait(timeout=120) == 1, log.read_text()
    torch.load(tmp_path / f'experiments/run/models/net_g_{states(tmp_path)[-1]}.pth', weights_only=True)


@pytest.mark.parametrize(
    ('rank', 'name', 'missing'),
    [
        (1, 'first stopped', 'process 0 of 2 (at localhost:'),  # the store is in it
        (0, 'second stopped', f'process 1 of 2 (on {NODE}): '),
        (1, 'first missing', 'process 0 of 2 (at localhost:'),
        (0, 'second missing', 'process 1 of 2 (has not joined): '),
    ],
)
def test_a_missing_process_is_named_and_the_other_ends(rank, name, missing, waiting, waiting_in):
    run = waiting[rank, name]
    assert run.status(timeout=150) == 1
    (line,) = [line for line in run.log().splitlines() if SILENT in line]
    assert missing in line and line.endswith(f'({LIMIT} s).')
    assert name.endswith('missing') or states(waiting_in / name), 'the last checkpoint is there'
    assert name.endswith('stopped') or not (waiting_in / name / 'experiments').exists()


def test_a_process_that_continues_is_reported_as_back(waiting, waiting_in):
    first, second = waiting[0, 'paused'], waiting[1, 'paused']
    first.wait_for(SILENT + "(torch's default)")
    os.kill(second.process.pid, signal.SIGCONT)
    first.wait_for(f'process 1 of 2 (on {NODE}): back.')
    (log,) = (waiting_in / 'paused/experiments/run').glob('train_*.log')
    assert SILENT in log.read_text()
    os.kill(second.process.pid, signal.SIGTERM)
    assert [first.status(), second.status()] == [128 + signal.SIGTERM] * 2
    assert SILENT not in second.log(), 'it does not take its own pause for one of the other'


def test_the_limit_must_be_a_number(images, tmp_path):
    run = Training(changed(forked.options(images), {'dist_params': {'timeout': 'long'}}), tmp_path)
    assert run.status() == 1 and 'dist_params.timeout: ' in run.log()
