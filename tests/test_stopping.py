"""Every usual way to stop a training saves it: pipes whose reader is gone, closed terminals, signals that come twice.

STOPS=20 stops each of them twenty times.
"""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support import forked
from support.forked import Training, changed, states
from support.torchrun import children, torchrun
from test_checkpoints import RUN, assert_ends_like

TIMES = range(int(os.environ.get('STOPS', 1)))
LONG = {'train.total_iter': 200_000, 'logger.save_checkpoint_freq': 100_000, 'val.val_freq': 3, 'train.pbar': True}


@pytest.fixture(scope='module')
def opt(tmp_path_factory):
    return changed(forked.options(forked.write_images(tmp_path_factory.mktemp('images') / 'images')), LONG)


def log_file(folder: Path) -> str:
    (file,) = (folder / RUN).glob('train_*.log')
    return file.read_text()


def check_saved(folder: Path, number: signal.Signals) -> int:
    """The iteration of the one checkpoint, which is the last that was done, as the log of the run says."""
    log = log_file(folder)
    (last,) = states(folder)
    assert f'{number.name}: training stops; iteration {last} is saved in {folder / RUN}.' in log
    assert f'{number.name}: training ends after iteration {last}, which is saved' in log.splitlines()[-1]
    assert f'iter:{last:8,d},' in log and f'iter:{last + 1:8,d},' not in log
    return last


def processes(run: Training) -> list[int]:
    """The training and what it has started."""
    return [run.process.pid, *children(run.process.pid)]


def to_all(run: Training, *numbers: int) -> None:
    """As Slurm and systemd: to each process."""
    for number in numbers:
        for pid in processes(run):
            os.kill(pid, number)


def as_timeout(run: Training) -> None:
    """What `timeout` does with Ctrl-C: to its child, then to its group, and both are woken up."""
    os.kill(run.process.pid, signal.SIGINT)
    os.killpg(run.process.pid, signal.SIGINT)
    os.kill(run.process.pid, signal.SIGCONT)


def twice(run: Training) -> None:
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(10 ** random.uniform(-5, -1.3))
    os.kill(run.process.pid, signal.SIGINT)


def close_terminal(run: Training) -> None:
    os.kill(int(run.log_file.with_suffix('.pid').read_text()), signal.SIGKILL)


STOPS = {
    'Ctrl-C under tee': ('tee', signal.SIGINT, lambda run: os.killpg(run.process.pid, signal.SIGINT)),
    'SIGTERM to the group under tee': ('tee', signal.SIGTERM, lambda run: os.killpg(run.process.pid, signal.SIGTERM)),
    'closed terminal': ('terminal', signal.SIGHUP, close_terminal),
    'scancel, systemd': ('tee', signal.SIGTERM, lambda run: to_all(run, signal.SIGTERM, signal.SIGCONT)),
    'timeout': ('file', signal.SIGINT, as_timeout),
    'two SIGINT': ('file', signal.SIGINT, twice),
    'SIGHUP': ('file', signal.SIGHUP, lambda run: os.kill(run.process.pid, signal.SIGHUP)),
    'SIGUSR1': ('file', signal.SIGUSR1, lambda run: to_all(run, signal.SIGUSR1)),
    'SIGUSR2': ('file', signal.SIGUSR2, lambda run: os.kill(run.process.pid, signal.SIGUSR2)),
    'SIGXCPU': ('file', signal.SIGXCPU, lambda run: os.kill(run.process.pid, signal.SIGXCPU)),
}  # fmt: skip


@pytest.mark.parametrize('_', TIMES)
@pytest.mark.parametrize('way', STOPS)
def test_a_stop_is_saved(way, _, opt, tmp_path):
    output, number, stop = STOPS[way]
    if way in ('scancel, systemd', 'SIGUSR1', 'Ctrl-C under tee'):
        opt = changed(opt, {'datasets.train.num_worker_per_gpu': 1})  # restarted for each epoch, of three iterations
    run = Training(opt, tmp_path, output=output)
    run.wait_for('iter:       4,')
    time.sleep(random.uniform(0, 0.1))
    stop(run)
    assert run.status() == 128 + number, run.log()
    last = check_saved(tmp_path, number)
    if way in ('Ctrl-C under tee', 'closed terminal'):
        opt = changed(opt, {'train.total_iter': last + 2, 'logger.save_checkpoint_freq': last + 2})
        assert_ends_like(opt, tmp_path, tmp_path / 'straight')


@pytest.mark.parametrize('_', TIMES)
def test_a_stop_of_all_processes_of_torchrun_is_saved(_, opt, tmp_path):
    """As scancel and systemd stop it: torchrun and its processes, in any order."""
    with torchrun(opt, tmp_path) as (run, log):
        pids = [run.pid, *children(run.pid)]
        for pid in random.sample(pids, len(pids)):
            with suppress(ProcessLookupError):  # ended already, by an earlier one
                os.kill(pid, signal.SIGTERM)
            time.sleep(random.choice([0, random.uniform(0, 0.05)]))
        assert run.wait(timeout=120) != 0, log.read_text()
    check_saved(tmp_path, signal.SIGTERM)
