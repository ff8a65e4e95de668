"""Nothing is lost: full disks, signals, kills at any moment, broken checkpoints; with trainings as processes.

KILLS=36 kills each kind of training 36 times.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support import forked
from support.forked import Training, changed, load, start_processes, states, train
from test_exact_resume import GAN, assert_equal

RUN = 'experiments/run'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return forked.write_images(tmp_path_factory.mktemp('images') / 'images')


def names(folder, part):
    return sorted(path.name for path in (folder / RUN / part).iterdir())


def files(folder):
    """Content of everything that a run has saved."""
    paths = [*(folder / RUN / 'models').iterdir(), *(folder / RUN / 'training_states').iterdir()]
    return {str(path): path.read_bytes() for path in paths}


def assert_ends_like(opt, folder, straight, train=train):
    """Resumed, it ends as if it had never been interrupted."""
    train(opt, folder, '--auto_resume')
    train(opt, straight)
    last = opt['train']['total_iter']
    for name in ('models/net_g_latest.pth', 'models/net_g_best.pth', f'training_states/{last}.state'):
        assert_equal(load(folder, name), load(straight, name))


# Full disks


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / 'small disk'
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', folder], capture_output=True).returncode:
        pytest.skip('mounting a small file system is not allowed here')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


# A network of 63 kB, a state of 126 kB
WIDE = {'network_g.dim': 512, 'train.ema_decay': 0, 'logger.keep_last': 1, 'val.val_freq': 1000}


def check_failed_save(run, folder, before, refused):
    assert run.status() == 1, run.log()
    assert f'{refused} cannot be saved: ' in run.log().splitlines()[-1]
    after = files(folder)
    assert {name: after[name] for name in before} == before, 'the last checkpoint is intact'
    new = {name for name in after if name not in before}
    assert all(name.endswith('net_g_6.pth') for name in new), 'none is truncated, none without a state'
    return new


@pytest.mark.parametrize(('limit', 'refused'), [(40_000, 'net_g_6.pth'), (90_000, '6.state')])
def test_a_failed_save_is_an_error(images, tmp_path, limit, refused):
    opt = changed(forked.options(images), WIDE)
    train(changed(opt, {'train.total_iter': 4}), tmp_path)
    before = files(tmp_path)
    run = Training(opt, tmp_path, '--auto_resume', limit=limit)
    new = check_failed_save(run, tmp_path, before, refused)
    assert len(new) == (refused == '6.state')
    assert 'File too large' in run.log()
    assert_ends_like(opt, tmp_path, tmp_path / 'straight')


def test_a_full_disk(images, tmp_path, small_disk):
    opt = changed(forked.options(images), WIDE)
    train(changed(opt, {'train.total_iter': 4}), small_disk)
    with open(small_disk / 'filler', 'wb') as filler:
        free = shutil.disk_usage(small_disk).free
        filler.write(bytes(free - 28_700))
    before = files(small_disk)
    run = Training(opt, small_disk, '--auto_resume')
    check_failed_save(run, small_disk, before, '')  # the network or the state: the log takes space too
    assert 'No space left on device' in run.log()
    (small_disk / 'filler').unlink()
    assert_ends_like(opt, small_disk, tmp_path / 'straight')


def test_a_best_network_that_cannot_be_saved_is_an_error(images, tmp_path):
    opt = changed(forked.options(images), {'val.val_freq': 3, 'logger.save_checkpoint_freq': 1})
    train(changed(opt, {'train.total_iter': 2}), tmp_path)
    best = tmp_path / RUN / 'models/net_g_best.pth'
    best.unlink()
    best.mkdir()
    run = Training(opt, tmp_path, '--auto_resume')
    assert run.status() == 1
    assert 'net_g_best.pth cannot be saved: [Errno 21] Is a directory' in run.log().splitlines()[-1]
    assert states(tmp_path) == [1, 2, 3], 'validation comes after the checkpoint'
    best.rmdir()
    assert_ends_like(opt, tmp_path, tmp_path / 'straight')


@pytest.mark.parametrize('sets', [1, 2])
def test_a_failed_validation_does_not_lose_the_checkpoint(images, tmp_path, sets):
    """The resumed training starts with this validation, so that the best network is the best of all."""
    opt = changed(forked.options(images), {'val.val_freq': 4, 'train.total_iter': 6, 'logger.save_checkpoint_freq': 2})
    own = forked.write_images(tmp_path / 'val images')
    opt['datasets'] |= {f'val_{n}': opt['datasets']['val'] | own | {'name': f'set {n}'} for n in range(1, sets)}
    opt['datasets']['val'] |= own if sets == 1 else {}
    image = Path(own['dataroot_lq'], '5.png')
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    run = Training(opt, tmp_path)
    assert run.status() == 1 and f'{image} is missing, truncated' in run.log()
    assert states(tmp_path) == [2, 4] and not (tmp_path / RUN / 'models/net_g_best.pth').exists()
    image.write_bytes(whole)
    assert_ends_like(opt, tmp_path, tmp_path / 'straight')
    assert load(tmp_path, 'training_states/6.state')['exact']['best']['val set']['psnr']['iter'] == 4


# Resumed with other options


def test_a_finished_training_can_be_extended(images, tmp_path):
    """BasicSR's schedulers ignore the new periods and end with a TypeError."""
    cosine = {'type': 'CosineAnnealingRestartLR', 'periods': [6], 'restart_weights': [1], 'eta_min': 0.004}
    opt = changed(forked.options(images), {'train.total_iter': 6, 'train.scheduler': cosine})
    train(opt, tmp_path)
    again = files(tmp_path)
    log = train(opt, tmp_path, '--auto_resume')
    assert files(tmp_path) == again and 'the option file applies from now on' not in log, 'nothing is left to do'
    log = train(changed(opt, {'train.total_iter': 12, 'train.scheduler.periods': [12]}), tmp_path, '--auto_resume')
    assert 'CosineAnnealingRestartLR: periods, cumulative_period changed' in log
    # The scheduler counts from 0: halfway from 0.01 to 0.004
    assert 'iter:       7, lr:(7.000e-03,)' in log and 'iter:      12,' in log


def test_a_training_of_other_parameters_does_not_continue(images, tmp_path):
    opt = changed(forked.options(images), {'train.freeze': ['body.0.bias'], 'train.total_iter': 4})
    train(opt, tmp_path)
    before = files(tmp_path)
    run = Training(changed(opt, {'train.freeze': ['body.2.bias'], 'train.total_iter': 8}), tmp_path, '--auto_resume')
    assert run.status() == 1
    names = 'no longer trained: net_g.body.2.bias; not trained before: net_g.body.0.bias.'
    last = run.log().splitlines()[-1]
    assert last.startswith(f'dpmambair_basicsr.train: {tmp_path / RUN}/training_states/4.state: {names}')
    assert 'Traceback' not in run.log() and files(tmp_path) == before
    log = train(changed(opt, {'train.total_iter': 8}), tmp_path, '--auto_resume')
    assert 'iter:       8,' in log


def test_metrics_may_change(images, tmp_path):
    opt = forked.options(images)
    train(changed(opt, {'train.total_iter': 4}), tmp_path)
    ssim = {'type': 'calculate_ssim', 'crop_border': 0}
    train(changed(opt, {'val.metrics.ssim': ssim, 'train.total_iter': 8}), tmp_path, '--auto_resume')
    best = load(tmp_path, 'training_states/8.state')['exact']['best']['val set']
    assert best.keys() == {'psnr', 'ssim'} and all(record['iter'] in (6, 8) for record in best.values())
    log = train(opt, tmp_path, '--auto_resume')
    assert 'iter:      10,' in log


# Which checkpoints exist


def test_only_the_last_are_kept(images, tmp_path):
    opt = changed(forked.options(images), {'logger.keep_last': 2, 'train.total_iter': 4})
    train(opt, tmp_path)
    models = tmp_path / RUN / 'models'
    for name in ('net_g_mine.pth', 'net_g_1.pth'):
        shutil.copy(models / 'net_g_4.pth', models / name)
    train(changed(opt, {'train.total_iter': 8}), tmp_path, '--auto_resume')
    assert states(tmp_path) == [6, 8]
    kept = ['1', '6', '8', 'best', 'latest', 'mine']
    assert names(tmp_path, 'models') == [f'net_g_{name}.pth' for name in kept]


def test_keep_last_must_be_a_number(images, tmp_path):
    run = Training(changed(forked.options(images), {'logger.keep_last': 0}), tmp_path)
    assert run.status() == 1 and 'logger.keep_last: expected int >= 1' in run.log()


def test_a_gradient_clipped_to_nothing_is_refused_before_the_start(images, tmp_path):
    run = Training(changed(forked.options(images), {'train.grad_clip_norm': 0}), tmp_path)
    assert run.status() == 1 and 'train.grad_clip_norm: must be above 0' in run.log().splitlines()[-1]
    assert not (tmp_path / 'experiments').exists()


def test_a_broken_pair_is_skipped(images, tmp_path):
    opt = forked.options(images)
    train(changed(opt, {'train.total_iter': 8}), tmp_path)
    newest = tmp_path / RUN / 'training_states/8.state'
    newest.write_bytes(newest.read_bytes()[:-50])
    network = tmp_path / RUN / 'models/net_g_6.pth'
    network.write_bytes(network.read_bytes()[:100])
    log = train(opt, tmp_path, '--auto_resume')
    assert f'Cannot resume from {newest}' in log and f'{network}: ' in log
    assert 'Resuming training from epoch: 1, iter: 4' in log
    train(opt, tmp_path / 'straight')
    assert_equal(load(tmp_path, 'models/net_g_latest.pth'), load(tmp_path / 'straight', 'models/net_g_latest.pth'))

    before = files(tmp_path)
    for state in (tmp_path / RUN / 'training_states').iterdir():
        state.write_bytes(b'')
    run = Training(opt, tmp_path, '--auto_resume')
    assert run.status() == 1 and 'none of its 5 training states is usable' in run.log()
    assert files(tmp_path).keys() == before.keys()


@pytest.mark.parametrize('frequency', [2, 1000])
def test_networks_without_any_state_are_not_archived(images, tmp_path, frequency):
    """Their states were lost, or never saved because the training was too short."""
    opt = changed(forked.options(images), {'logger.save_checkpoint_freq': frequency, 'train.total_iter': 4})
    train(opt, tmp_path)
    for state in (tmp_path / RUN / 'training_states').iterdir():
        state.unlink()
    before = files(tmp_path)
    run = Training(opt, tmp_path, '--auto_resume')
    assert run.status() == 1 and 'has networks, but' in run.log() and 'starts at iteration 0' in run.log()
    assert files(tmp_path) == before and not list(tmp_path.glob('experiments/*archived*'))


def test_an_incomplete_first_checkpoint_does_not_count(images, tmp_path):
    opt = changed(forked.options(images), {'train.total_iter': 4})
    train(changed(opt, {'train.total_iter': 2}), tmp_path)
    (tmp_path / RUN / 'models/net_g_latest.pth').unlink()
    (tmp_path / RUN / 'training_states/2.state').unlink()
    assert_ends_like(opt, tmp_path, tmp_path / 'straight')


def test_a_state_of_basicsr_resumes(images, tmp_path):
    opt = forked.options(images)
    train(changed(opt, {'train.total_iter': 4}), tmp_path)
    file = tmp_path / RUN / 'training_states/4.state'
    state = torch.load(file, weights_only=True)
    del state['exact'], state['trained']
    torch.save(state, file)
    log = train(opt, tmp_path, '--auto_resume')
    assert 'its epoch and the best metrics start over' in log and 'iter:      10,' in log


# Signals


@pytest.mark.parametrize(
    ('number', 'workers', 'prefetch'), [(signal.SIGINT, 0, None), (signal.SIGTERM, 2, None), (signal.SIGINT, 1, 'cpu')]
)
def test_a_signal_ends_training_after_the_iteration(images, tmp_path, number, workers, prefetch):
    """The loader's workers get it too: Ctrl-C and torchrun send it to the whole group, Slurm to each process."""
    opt = forked.options(images)
    opt['datasets']['train'] |= {'num_worker_per_gpu': workers, 'prefetch_mode': prefetch, 'dataset_enlarge_ratio': 99}
    opt = changed(opt, {'logger.save_checkpoint_freq': 1000, 'val.val_freq': 3})
    run = Training(changed(opt, {'train.total_iter': 20_000}), tmp_path)
    run.wait_for('iter:       4,')
    for pid in Path(f'/proc/{run.process.pid}/task/{run.process.pid}/children').read_text().split():
        os.kill(int(pid), number)
    os.killpg(run.process.pid, number)
    assert run.status() == 128 + number, run.log()
    (last,) = states(tmp_path)
    assert f'{number.name}: training ends after iteration {last}, which is saved' in run.log().splitlines()[-1]
    assert f'iter:{last:8},' in run.log() and f'iter:{last + 1:8},' not in run.log()
    opt = changed(opt, {'train.total_iter': last + 4})
    train(opt, tmp_path, '--auto_resume')
    train(opt, tmp_path / 'straight')
    latest = 'models/net_g_latest.pth'
    assert_equal(load(tmp_path, latest), load(tmp_path / 'straight', latest))


def test_a_signal_to_one_of_two_processes_ends_both(images, tmp_path):
    opt = changed(forked.options(images), {'train.total_iter': 20_000, 'logger.save_checkpoint_freq': 1000})
    first, second = start_processes(opt, tmp_path)
    first.wait_for('iter:       4,')
    os.kill(second.process.pid, signal.SIGTERM)
    assert [first.status(), second.status()] == [128 + signal.SIGTERM] * 2, first.log() + second.log()
    assert len(states(tmp_path)) == 1


def test_a_second_signal_ends_training_at_once(images, tmp_path):
    run = Training(changed(forked.options(images), {'network_g.seconds': 60}), tmp_path)
    run.wait_for('TinyNet takes 60 s')
    os.kill(run.process.pid, signal.SIGTERM)
    run.wait_for('repeat after 2 s to kill it')
    time.sleep(2)  # since the handler began
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.status(timeout=20) == -signal.SIGTERM


# Killed


# Name -> changes of the options, number of kills.
KILLED = {
    'plain': ({}, 20),
    'GAN, two workers, progressive': (
        GAN
        | {
            'datasets.train.num_worker_per_gpu': 2,
            'datasets.train.progressive': {'gt_sizes': [8, 8], 'batch_sizes': [2, 1], 'iters': [8, 30_000]},
        },
        5,
    ),
}


@pytest.mark.parametrize('kind', KILLED)
def test_killed_at_random_moments(kind, images, tmp_path):
    """Every file under a final name is complete, and the last training ends as if it had been the only one."""
    changes, kills = KILLED[kind]
    opt = {'train.total_iter': 20_000, 'logger.save_checkpoint_freq': 1, 'val.val_freq': 7, 'logger.keep_last': 3}
    opt = changed(forked.options(images), opt | changes)
    rng = random.Random(0)
    for attempt in range(int(os.environ.get('KILLS', kills))):
        run = Training(opt, tmp_path, '--auto_resume')
        if attempt % 5 != 4:  # sometimes it is killed before training begins
            run.wait_for('Start training')
        while attempt == 0 and not states(tmp_path):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        run.process.kill()
        assert run.status() == -signal.SIGKILL, run.log()
        for path in (tmp_path / RUN).glob('*/*.*'):
            if path.suffix in ('.pth', '.state'):
                torch.load(path, weights_only=True)
        numbers = states(tmp_path)
        assert numbers and all(f'net_g_{number}.pth' in names(tmp_path, 'models') for number in numbers)
    assert_ends_like(changed(opt, {'train.total_iter': numbers[-1] + 3}), tmp_path, tmp_path / 'straight')
    assert not list((tmp_path / RUN).glob('*/.*')), 'no temporary file is left'
    assert not list(tmp_path.glob('experiments/*archived*'))
