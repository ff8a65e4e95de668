"""Every usual way to stop a training saves it: pipes whose reader is gone, closed terminals, repeated signals.

STOPS=20 stops each of them twenty times.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from support import forked
from support.commands import PACKAGE_PARENT
from support.forked import Training, changed, start_processes, states
from support.programs import TIMEOUT, TORCHRUN, children, training
from test_checkpoints import RUN, assert_ends_like

from dpmambair_basicsr.training import signals

TIMES = range(int(os.environ.get('STOPS', 1)))
LONG = {'train.total_iter': 200_000, 'logger.save_checkpoint_freq': 100_000, 'val.val_freq': 3, 'train.pbar': True}


@pytest.fixture(scope='module')
def opt(tmp_path_factory):
    return changed(forked.options(forked.write_images(tmp_path_factory.mktemp('images') / 'images')), LONG)


def log_file(folder: Path) -> str:
    (file,) = (folder / RUN).glob('train_*.log')
    return file.read_text()


def check_saved(folder: Path, number: signal.Signals) -> int:
    """The iteration of the only checkpoint, which is the last completed one according to the log of the run."""
    log = log_file(folder)
    (last,) = states(folder)
    assert f'{number.name}: training stops; iteration {last} is saved in {folder / RUN}.' in log
    closed = 'It is closed; output continues in this log.'  # on the first write to a pipe without a reader
    *_, end = (line for line in log.splitlines() if closed not in line)
    assert f'{number.name}: training ends after iteration {last}, which is saved' in end
    assert f'iter:{last:8,d},' in log and f'iter:{last + 1:8,d},' not in log
    return last


def processes(run: Training) -> list[int]:
    """The training and its descendants."""
    return [run.process.pid, *children(run.process.pid)]


def to_all(run: Training, *numbers: int) -> None:
    """Like Slurm and systemd: to each process."""
    for number in numbers:
        for pid in processes(run):
            os.kill(pid, number)


def as_timeout(run: Training) -> None:
    """What `timeout` does on Ctrl-C: to its child, then to its group, and both are continued."""
    os.kill(run.process.pid, signal.SIGINT)
    os.killpg(run.process.pid, signal.SIGINT)
    os.kill(run.process.pid, signal.SIGCONT)


def twice(run: Training) -> None:
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(10 ** random.uniform(-5, -1.3))
    with suppress(ProcessLookupError):  # it may have ended
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


def test_a_signal_that_the_parent_had_ignored_stays_ignored(opt, tmp_path):
    run = Training(opt, tmp_path, output='nohup')
    run.wait_for('iter:       4,')
    os.kill(run.process.pid, signal.SIGHUP)
    done = len(run.log().split('iter:'))
    run.wait_for(f'iter:{done + 2:8,d},')
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.status() == 128 + signal.SIGTERM and 'SIGHUP' not in run.log()
    check_saved(tmp_path, signal.SIGTERM)


def stop_and_repeat_after_the_answer() -> None:
    signals.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(signals.SAME_REQUEST + 0.1)
    signals.answered()
    os.kill(os.getpid(), signal.SIGTERM)
    sys.exit(128 + signals.received)


def test_a_request_repeated_while_the_training_ends_counts_once():
    """As torchrun does when the first of its processes has ended, after an iteration of many seconds."""
    process = multiprocessing.get_context('forkserver').Process(target=stop_and_repeat_after_the_answer)
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM


REPEATED_AT_EXIT = """
import os, signal
from dpmambair_basicsr.training import signals

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        kill(process, number)

late = Late()  # deleted after Python has reset all handlers
raise signals.StoppedBySignal(signal.SIGINT)
"""


def test_a_request_repeated_while_python_shuts_down_leaves_the_exit_status():
    environment = os.environ | {'PYTHONPATH': str(PACKAGE_PARENT)}
    assert subprocess.run([sys.executable, '-c', REPEATED_AT_EXIT], env=environment).returncode == 128 + signal.SIGINT


def in_any_order(pids: list[int], number: int) -> None:
    """To each of them, at once or up to 50 ms after the one before; some may have ended by then."""
    for pid in random.sample(pids, len(pids)):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        time.sleep(random.choice([0, random.uniform(0, 0.05)]))


@pytest.mark.parametrize('_', TIMES)
@pytest.mark.parametrize('signalled', [(0, 1), (0, 0, 1, 1), (1, 1)], ids=['both', 'both twice', 'one of them twice'])
def test_a_stop_of_two_processes_is_saved(signalled, _, opt, tmp_path):
    runs = start_processes(opt, tmp_path)
    runs[0].wait_for('iter:       4,')
    in_any_order([runs[rank].process.pid for rank in signalled], signal.SIGTERM)
    assert [run.status() for run in runs] == [128 + signal.SIGTERM] * 2, runs[0].log() + runs[1].log()
    check_saved(tmp_path, signal.SIGTERM)


def to_each(pid: int, number: int) -> None:
    in_any_order([pid, *children(pid)], number)


PROGRAMS = {
    'Ctrl-C of timeout': (TIMEOUT, signal.SIGINT, os.killpg, 128 + signal.SIGINT),
    'Ctrl-C of torchrun': (TORCHRUN, signal.SIGINT, os.killpg, 1),
    'SIGTERM to each process of torchrun': (TORCHRUN, signal.SIGTERM, to_each, 1),
    'SIGUSR1 to each process of torchrun': (TORCHRUN, signal.SIGUSR1, to_each, 1),
}  # fmt: skip


@pytest.mark.parametrize('_', TIMES)
@pytest.mark.parametrize('way', PROGRAMS)
def test_a_stop_of_a_program_under_tee_is_saved(way, _, opt, tmp_path):
    """Real programs: `timeout` and torchrun forward signals that their processes already have, and tee ends first."""
    program, number, stop, status = PROGRAMS[way]
    with training(program, opt, tmp_path) as (run, log):
        stop(run.pid, number)
        assert run.wait(timeout=250) == status, log.read_text()
    check_saved(tmp_path, number)
