"""Checkpoints, training states and option files of version 692b954: read, and continued as that version did.

data/run_of_692b954.tar.xz holds for RestorationModel and RestorationGANModel an option file, the checkpoint of
iteration 4, and the one of iteration 8 that version 692b954 continued to. Other processors round differently, so
numbers of that file are compared with a tolerance; where git has the version, it trains here and
all bits are compared.
"""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from support import forked
from support.commands import PACKAGE_PARENT, python
from support.forked import changed, train
from test_exact_resume import GAN, assert_equal, resumed_at
from torch.utils._pytree import tree_flatten

VERSION = '692b954'
ARCHIVE = Path(__file__).parent / 'data' / f'run_of_{VERSION}.tar.xz'
FILES = {'restoration': ['net_g'], 'gan': ['net_g', 'net_d']}


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recorded')
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter='data')
    return folder


def assert_close(value, expected, name):
    (leaves, structure), (expected_leaves, expected_structure) = map(tree_flatten, (value, expected))
    assert structure == expected_structure, name
    for pair in zip(leaves, expected_leaves, strict=True):
        if isinstance(pair[0], torch.Tensor | float):
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
        else:
            assert pair[0] == pair[1], name


@pytest.mark.parametrize('kind', FILES)
def test_a_recorded_run_continues(kind, recorded, tmp_path):
    forked.write_images(tmp_path / 'images')
    shutil.copytree(recorded / kind / 'at_4', tmp_path / 'experiments/run')
    opt = yaml.safe_load((recorded / kind / 'options.yml').read_text())
    log = train(opt, tmp_path, '--auto_resume')
    assert 'Best psnr so far: 6.' in log and 'iter: 4\n' in log.partition('Start training from')[2]
    for name in ['training_states/8.state', *(f'models/{net}_8.pth' for net in FILES[kind])]:
        expected = torch.load(recorded / kind / 'at_8' / name, weights_only=True)
        assert_close(forked.load(tmp_path, name), expected, name)


@pytest.fixture(scope='module')
def earlier_version(tmp_path_factory):
    """A folder with the files of that version."""
    folder = tmp_path_factory.mktemp('earlier') / 'version.tar'
    git = ('git', '-C', PACKAGE_PARENT, 'archive', '--output', folder, VERSION)
    if not shutil.which('git') or subprocess.run(git, capture_output=True).returncode:
        pytest.skip(f'git has no version {VERSION} here')
    with tarfile.open(folder) as archive:
        archive.extractall(folder.parent, filter='data')
    return folder.parent


KINDS = {
    'RestorationModel': {
        'network_g': {'type': 'VmambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1},
        'train.grad_clip_norm': 0.1,
        'train.mse_opt': {'type': 'MSELoss'},
        'train.warmup_iter': -1,
    },
    'RestorationGANModel': GAN | {'train.warmup_iter': -1},
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_run_continues_bit_exactly(kind, earlier_version, tmp_path):
    opt = changed(forked.options(forked.write_images(tmp_path / 'images')), KINDS[kind])
    opt = changed(opt, {'train.total_iter': 6, 'logger.save_checkpoint_freq': 3})
    (tmp_path / 'options.yml').write_text(yaml.safe_dump(opt))
    script = (
        'import dpmambair_basicsr, forked_runs, sys; print(dpmambair_basicsr.__file__); '
        "sys.argv = ['train.py', '-opt', '../options.yml']; dpmambair_basicsr.train.main()"
    )
    straight = tmp_path / 'straight'
    straight.mkdir()
    result = python('-c', script, cwd=straight, PYTHONPATH=f'{earlier_version}:{earlier_version / "tests"}')
    assert result.returncode == 0, result.stdout
    assert str(earlier_version) in result.stdout, 'that version has run'
    target = resumed_at(3, straight, tmp_path / 'resumed')
    train(opt, target, '--auto_resume')
    for name in ('training_states/6.state', 'models/net_g_latest.pth', 'models/net_g_best.pth'):
        assert_equal(forked.load(target, name), forked.load(straight, name))
