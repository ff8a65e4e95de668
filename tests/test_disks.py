"""A full disk: images are complete or an error; plots and the log, which are not essential, never end a training."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
from basicsr.utils import logger as basicsr_logger
from support import commands, forked, pipelines
from support.forked import Training, changed

import dpmambair_basicsr.train  # noqa: F401  (with the patches)
from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.codec import write_image
from dpmambair_basicsr.patches.apply import apply_patches

apply_patches()


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of N KiB on a folder."""
    mounted = []

    def mount(name: str, size: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ['mount', '-t', 'tmpfs', '-o', f'size={size}k', 'tmpfs', str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f'no small file system: {error}')
        if done.returncode:
            pytest.skip(f'no small file system, which needs root: {done.stderr.strip()}')
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.fixture
def opt(tmp_path):
    """Without checkpoints before the end."""
    opt = forked.options(forked.write_images(tmp_path / 'images'))
    return changed(opt, {'logger.save_checkpoint_freq': 10**6, 'val.val_freq': 10**6})


@pytest.mark.parametrize('model', ['RestorationModel', 'SRModel'])
def test_validation_images_are_whole_or_an_error(model, opt, tmp_path, small_disk):
    """On a full disk they used to be files of 0 bytes, with exit status 0."""
    disk = small_disk('experiments', 64)
    changes = {'val.val_freq': 1, 'val.save_img': True, 'train.total_iter': 60, 'model_type': model}
    run = Training(changed(opt, changes), tmp_path)
    assert run.status() == 1, run.log()
    assert '.png' in run.log().splitlines()[-1] and 'No space left on device' in run.log().splitlines()[-1]
    images = list(disk.rglob('*.png'))
    assert len(images) > 7
    for file in images:
        assert cv2.imread(str(file)).shape == (12, 14, 3), file
    assert not list(disk.rglob('*.part'))


def test_images_of_a_test_are_whole_or_an_error(tmp_path, small_disk):
    opt = commands.stock_options(commands.write_images(tmp_path / 'images'))
    opt |= {'datasets': {'test': opt['datasets']['val']}, 'val': {'save_img': True, 'suffix': None}}
    del opt['train'], opt['logger']
    disk = small_disk('results', 16)
    with pytest.raises(OSError, match=r'No space left on device.*\.png'):
        pipelines.test(commands.write_options(opt, tmp_path / 'options.yml'), cwd=tmp_path)
    for file in disk.rglob('*.png'):
        assert cv2.imread(str(file)).shape == (32, 32, 3), file
    assert not list(disk.rglob('*.part')) and len(list(disk.rglob('*.png'))) < 4


def test_a_full_disk_of_plots_ends_no_training(opt, tmp_path, small_disk):
    small_disk('tb_logger', 4)
    run = Training(changed(opt, {'logger.use_tb_logger': True, 'train.total_iter': 60, 'val.val_freq': 10}), tmp_path)
    assert run.status() == 0, run.log()
    assert run.log().count('TensorBoard is switched off, training continues: ') == 1
    assert len(forked.load(tmp_path, 'models/net_g_latest.pth')['params']) > 0


def test_a_disk_of_plots_without_room_for_a_file_ends_no_training(opt, tmp_path, small_disk, monkeypatch):
    """The folder of the run exists, but has no room for a file."""
    disk = small_disk('tb_logger', 4)
    subprocess.run(['mount', '-o', 'remount,nr_inodes=3', str(disk)], check=True)
    run = Training(changed(opt, {'logger.use_tb_logger': True, 'train.total_iter': 2}), tmp_path)
    assert run.status() == 0, run.log()
    assert run.log().count('TensorBoard is switched off, training continues: ') == 1


def test_a_full_disk_of_the_log_ends_no_training_and_the_log_continues_once_there_is_room(opt, tmp_path, small_disk):
    disk = small_disk('experiments', 256)
    run = Training(changed(opt, {'train.total_iter': 400}), tmp_path)
    run.wait_for('iter:       6,')
    filler = disk / 'filler'
    with pytest.raises(OSError), open(filler, 'wb', buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    run.wait_for('.log cannot be written, training continues: No space left on device')
    filler.unlink()
    assert run.status() == 0, run.log()
    assert run.log().count('cannot be written') == 1 and 'Traceback' not in run.log()
    (log,) = disk.glob('run/*.log')
    assert 'End of training' in log.read_text()


def test_a_full_disk_of_wandb_ends_no_training(monkeypatch, caplog):
    def init(**arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stub = types.SimpleNamespace(init=init, util=types.SimpleNamespace(generate_id=lambda: 'x'))
    monkeypatch.setitem(sys.modules, 'wandb', stub)
    monkeypatch.setattr(basicsr_logger.get_root_logger(), 'propagate', True)
    basicsr_logger.init_wandb_logger({'name': 'x', 'logger': {'wandb': {'project': 'x'}}})
    assert 'wandb is switched off, training continues: ' in caplog.text


def test_an_image_that_cannot_be_encoded_is_an_error_that_names_it(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    for name in ('x.unknown', 'x'):
        with pytest.raises(OSError, match=f'{tmp_path}/{name} cannot be encoded'):
            write_image(tmp_path / name, image)
    with pytest.raises(OSError, match=f'No such file.*{tmp_path}/nowhere/x.png'):
        write_image(tmp_path / 'nowhere/x.png', image)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('durable', [True, False])
@pytest.mark.parametrize('shared', [True, False])
def test_a_file_is_replaced_as_a_whole_and_never_through_a_link(durable, shared, tmp_path):
    file, other = tmp_path / 'x', tmp_path / 'other'
    file.write_text('old')
    other.write_text('of the user')
    (tmp_path / f'.x.{os.getpid()}.part').symlink_to(other)
    (tmp_path / '.x.part').symlink_to(other)
    with pytest.raises(KeyError), replacing(file, durable, shared) as part:
        part.write_text('half')
        raise KeyError
    assert file.read_text() == 'old' and not part.exists()
    with replacing(file, durable, shared) as part:
        part.write_text('new')
        assert file.read_text() == 'old'
    assert file.read_text() == 'new' and other.read_text() == 'of the user' and not part.exists()
