"""One run, one process group: a second one is refused, whether it starts or resumes; stale locks are no obstacle."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import commands, forked, pipelines
from support.forked import Training, changed, start_processes, states, train
from test_checkpoints import files

from dpmambair_basicsr.files import lock

LONG = {'train.total_iter': 200_000, 'logger.save_checkpoint_freq': 100_000, 'val.val_freq': 100_000}
LOCK = 'experiments/.run.lock'
PACKAGE = str(commands.PACKAGE_PARENT)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return forked.write_images(tmp_path_factory.mktemp('images') / 'images')


@pytest.fixture
def opt(images):
    return changed(forked.options(images), LONG)


def end(run):
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.status() == 128 + signal.SIGTERM, run.log()


def refusal(run, holder):
    """The only line that a refused training writes."""
    assert run.status() == 1, run.log()
    lines = [line for line in run.log().splitlines() if 'is using this folder' in line]
    assert len(lines) == 1, run.log()
    assert f'process {holder.process.pid} on ' in lines[0] and 'Traceback' not in run.log()
    return lines[0]


@pytest.mark.parametrize('delay', [0, 0.1])
def test_of_two_simultaneous_starts_one_trains(opt, tmp_path, delay):
    first = Training(opt, tmp_path)
    time.sleep(delay)
    second = Training(opt, tmp_path)
    while first.process.exitcode is None and second.process.exitcode is None:
        time.sleep(0.01)
    loser, winner = (first, second) if second.process.exitcode is None else (second, first)
    assert f'{tmp_path}/experiments/run: ' in refusal(loser, winner)
    winner.wait_for('iter:       2,')
    end(winner)
    assert [path.name for path in (tmp_path / 'experiments').iterdir()] == ['run']
    assert len(states(tmp_path)) == 1


@pytest.mark.parametrize('arguments', [[], ['--auto_resume']])
def test_a_resumed_run_is_left_alone(opt, tmp_path, arguments):
    train(changed(opt, {'train.total_iter': 2, 'logger.save_checkpoint_freq': 2}), tmp_path)
    run = Training(opt, tmp_path, '--auto_resume')
    run.wait_for('iter:       4,')
    before = files(tmp_path)
    second = changed(opt, {'logger.keep_last': 1})
    message = refusal(Training(second, tmp_path, *arguments), run)
    assert message.endswith(f'Its lock is {tmp_path / LOCK}')
    assert files(tmp_path) == before and not list(tmp_path.glob('experiments/*archived*'))
    end(run)
    assert not (tmp_path / LOCK).exists()
    (last,) = {*states(tmp_path)} - {2}
    log = train(changed(opt, {'train.total_iter': last + 2}), tmp_path, '--auto_resume')
    assert f'iter:{last + 2:8,d},' in log and 'lock' not in log


def test_plots_of_one_name_belong_to_one_training(opt, tmp_path):
    pytest.importorskip('tensorboard')
    opt = changed(opt, {'logger.use_tb_logger': True})
    run = Training(opt, tmp_path)
    run.wait_for('iter:       2,')
    other = changed(opt, {'path.experiments_root': str(tmp_path / 'elsewhere')})
    assert f'{tmp_path}/tb_logger/run: ' in refusal(Training(other, tmp_path), run)
    assert not (tmp_path / 'elsewhere').exists() and len(list((tmp_path / 'tb_logger').glob('run*'))) == 1
    end(run)


def test_the_lock_of_a_killed_training_is_taken_over(opt, tmp_path):
    run = Training(opt, tmp_path)
    run.wait_for('iter:       2,')
    run.process.kill()
    assert run.status() == -signal.SIGKILL
    assert json.loads((tmp_path / LOCK).read_text())['pid'] == run.process.pid
    log = train(changed(opt, {'train.total_iter': 2}), tmp_path)
    assert f'process {run.process.pid} on ' in log and 'has ended without releasing its lock' in log
    assert not (tmp_path / LOCK).exists()


def test_the_processes_of_one_training_share_the_lock(opt, tmp_path):
    runs = start_processes(opt, tmp_path)
    runs[0].wait_for('iter:       2,')
    for second in start_processes(opt, tmp_path, '--auto_resume'):
        refusal(second, runs[0])
    os.kill(runs[1].process.pid, signal.SIGTERM)
    assert [run.status() for run in runs] == [128 + signal.SIGTERM] * 2, runs[0].log()


def test_a_training_whose_run_was_taken_over_writes_no_more(opt, tmp_path):
    """It was frozen for longer than the lease, and another machine continued the run."""
    run = Training(opt, tmp_path)
    run.wait_for('iter:       2,')
    other = json.loads((tmp_path / LOCK).read_text()) | {'host': 'other-node', 'pid': 7}
    (tmp_path / LOCK).write_text(json.dumps(other))
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.status() == 1 and not states(tmp_path)
    assert 'process 7 on other-node' in run.log().splitlines()[-1]
    assert json.loads((tmp_path / LOCK).read_text()) == other


def test_results_of_one_name_belong_to_one_test(images, tmp_path):
    opt = commands.stock_options(commands.write_images(tmp_path / 'images'))
    opt['datasets'] = {'test': opt['datasets']['val']}
    opt |= {'val': {'save_img': False, 'metrics': opt['val']['metrics']}}
    del opt['train'], opt['logger']
    file = commands.write_options(opt, tmp_path / 'options.yml')
    holding = (
        'import sys; from dpmambair_basicsr.files import lock; lock.hold(sys.argv[1]); print(1, flush=True); input()'
    )
    environment = os.environ | {'PYTHONPATH': str(commands.PACKAGE_PARENT)}
    other = subprocess.Popen(
        [sys.executable, '-c', holding, tmp_path / 'results/tiny'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert other.stdout.readline() == b'1\n'
    with pytest.raises(lock.LockedFolderError, match=f'results/tiny: process {other.pid} on '):
        pipelines.test(file, cwd=tmp_path)
    other.communicate(b'\n')
    assert not list((tmp_path / 'results').iterdir())
    pipelines.test(file, cwd=tmp_path)
    assert (tmp_path / 'results/tiny').is_dir()
    lock.release()


# Another machine, whose processes are unknown


@pytest.fixture
def foreign(tmp_path):
    file = tmp_path / '.run.lock'
    file.write_text(json.dumps(lock.identity() | {'host': 'other-node', 'pid': 1}))
    yield file
    lock.release()


@pytest.mark.parametrize('content', [None, '', 'text', '[]', '{"pid": 1}'])
def test_a_lock_that_nobody_renews_is_taken_over(foreign, tmp_path, monkeypatch, capsys, content):
    """None: that of another machine; otherwise its writer was killed, or it is not ours."""
    if content is not None:
        foreign.write_text(content)
    monkeypatch.setattr(lock, 'LEASE', 1)
    lock.hold(tmp_path / 'run')
    output = capsys.readouterr().out
    assert 'if you know that it has ended, delete this file' in output and 'taken over' in output
    assert ('process 1 on other-node' in output) == (content is None)
    assert json.loads(foreign.read_text())['pid'] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_another_machine_renews_is_respected(foreign, tmp_path):
    held = foreign.read_text()
    stopped = threading.Event()

    def renew():
        while not stopped.wait(0.1):
            os.utime(foreign)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(lock.LockedFolderError, match='process 1 on other-node, since .*is using this folder'):
            lock.hold(tmp_path / 'run')
    finally:
        stopped.set()
        thread.join()
    assert foreign.read_text() == held


def test_a_lock_released_by_its_holder_is_acquired(foreign, tmp_path):
    timer = threading.Timer(0.5, foreign.unlink)
    timer.start()
    lock.hold(tmp_path / 'run')
    assert json.loads(foreign.read_text())['pid'] == os.getpid()


def test_a_reused_process_id_is_not_the_holder(tmp_path, capsys):
    file = tmp_path / '.run.lock'
    file.write_text(json.dumps(lock.identity() | {'started': '1'}))
    lock.hold(tmp_path / 'run')
    assert 'has ended without releasing its lock' in capsys.readouterr().out
    lock.release()


def test_a_lock_removed_by_hand_is_recreated(tmp_path):
    lock.hold(tmp_path / 'run')
    (tmp_path / '.run.lock').unlink()
    lock.check()
    assert json.loads((tmp_path / '.run.lock').read_text())['pid'] == os.getpid()
    lock.release()


def test_a_lock_is_beside_the_folder_that_a_link_leads_to(tmp_path):
    (tmp_path / 'disk/run').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'disk/run')
    lock.hold(tmp_path / 'link')
    assert (tmp_path / 'disk/.run.lock').is_file()
    lock.release()


def test_exactly_one_process_takes_over_a_stale_lock(tmp_path):
    """They examine and remove it at the same time."""
    (tmp_path / '.run.lock').write_text(json.dumps(lock.identity() | {'started': '1'}))
    script = 'import sys; from dpmambair_basicsr.files import lock; print("ready", flush=True); input(); '
    script += 'lock.hold(sys.argv[1]); print("mine", flush=True); input()'
    command, pipe = [sys.executable, '-c', script, tmp_path / 'run'], subprocess.PIPE
    environment = os.environ | {'PYTHONPATH': str(commands.PACKAGE_PARENT)}
    waiting = [
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(6)
    ]
    for process in waiting:
        assert process.stdout.readline() == 'ready\n'
    for process in waiting:
        process.stdin.write('\n')
        process.stdin.flush()
    while sum(process.poll() is None for process in waiting) > 1:
        time.sleep(0.01)
    (one,) = [process for process in waiting if process.poll() is None]
    assert one.communicate('\n')[0].endswith('mine\n') and one.returncode == 0
    errors = [process.communicate()[1] for process in waiting if process is not one]
    assert all('LockedFolderError: ' in error for error in errors)


def test_a_process_killed_while_creating_its_lock_is_no_obstacle(tmp_path):
    code = (
        'import os, signal, sys; from dpmambair_basicsr.files import lock\n'
        'os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n'
        'lock.hold(sys.argv[1])'
    )
    done = subprocess.run([sys.executable, '-c', code, tmp_path / 'run'], env=os.environ | {'PYTHONPATH': PACKAGE})
    assert done.returncode == -signal.SIGKILL and not (tmp_path / '.run.lock').exists()
    lock.hold(tmp_path / 'run')
    lock.release()


def test_a_lock_needs_no_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', link)
    lock.hold(tmp_path / 'run')
    assert json.loads((tmp_path / '.run.lock').read_text())['pid'] == os.getpid()
    assert [file.name for file in tmp_path.iterdir()] == ['.run.lock']
    lock.release()
    assert not (tmp_path / '.run.lock').exists()
