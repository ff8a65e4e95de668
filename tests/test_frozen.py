"""A process of several that is stopped, or never comes, is named in half a minute and not waited for without end."""

import os
import signal

import pytest
from support import forked
from support.forked import Training, changed, start_processes, states

LONG = {'train.total_iter': 200_000, 'logger.save_checkpoint_freq': 5, 'logger.keep_last': 1, 'val.val_freq': 100_000}
LIMIT = 30  # seconds
NODE = os.uname().nodename
SILENT = 'no sign of life for 15 s. The others wait; dist_params.timeout ends it '


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('frozen')


@pytest.fixture(scope='module')
def trainings(folder):
    """Of two processes each; all of them wait at the same time: (rank, name) -> the process."""
    opt = changed(forked.options(forked.write_images(folder / 'images', count=8)), LONG)
    limited, found = changed(opt, {'dist_params': {'timeout': LIMIT}}), {}
    for stopped, name in ((0, 'first stopped'), (1, 'second stopped'), (1, 'paused')):
        runs = start_processes(opt if name == 'paused' else limited, folder / name)
        runs[0].wait_for('iter:       6,')
        os.kill(runs[stopped].process.pid, signal.SIGSTOP)
        found |= {(rank, name): run for rank, run in enumerate(runs)}
    for rank, name in ((1, 'first missing'), (0, 'second missing')):
        environment = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(forked.free_port()), 'WORLD_SIZE': '2'}
        environment |= {'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        found[rank, name] = Training(limited, folder / name, '--launcher', 'pytorch', environment=environment)
    yield found
    for run in found.values():
        run.process.kill()


@pytest.mark.parametrize(
    ('rank', 'name', 'missing'),
    [
        (1, 'first stopped', 'process 0 of 2 (at localhost:'),  # the store is in it
        (0, 'second stopped', f'process 1 of 2 (on {NODE}): '),
        (1, 'first missing', 'process 0 of 2 (at localhost:'),
        (0, 'second missing', 'process 1 of 2 (has not come): '),
    ],
)
def test_a_missing_process_is_named_and_the_other_ends(rank, name, missing, trainings, folder):
    run = trainings[rank, name]
    assert run.status(timeout=150) == 1
    (line,) = [line for line in run.log().splitlines() if SILENT in line]
    assert missing in line and line.endswith(f'({LIMIT} s).')
    assert name.endswith('missing') or states(folder / name), 'the last checkpoint is there'
    assert name.endswith('stopped') or not (folder / name / 'experiments').exists()


def test_a_process_that_continues_is_said_to_be_back(trainings, folder):
    first, second = trainings[0, 'paused'], trainings[1, 'paused']
    first.wait_for(SILENT + "(torch's default)")
    os.kill(second.process.pid, signal.SIGCONT)
    first.wait_for(f'process 1 of 2 (on {NODE}): back.')
    (log,) = (folder / 'paused/experiments/run').glob('train_*.log')
    assert SILENT in log.read_text()
    os.kill(second.process.pid, signal.SIGTERM)
    assert [first.status(), second.status()] == [128 + signal.SIGTERM] * 2
    assert SILENT not in second.log(), 'it does not take its own pause for one of the other'


def test_the_limit_is_a_number(folder):
    opt = changed(forked.options(forked.write_images(folder / 'few images')), {'dist_params': {'timeout': 'long'}})
    run = Training(opt, folder / 'wrong limit')
    assert run.status() == 1 and 'dist_params.timeout: ' in run.log()
