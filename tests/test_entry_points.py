"""Our own entry points, as commands: they train, resume and test with BasicSR's loop, on CPUs and several of them."""

import sys

import pytest
from basicsr_runs import python, run, stock_options, write_images, write_options


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('entry_points')


@pytest.fixture(scope='module')
def trained(folder):
    """The folder of two iterations in a directory of its own."""
    opt = stock_options(write_images(folder / 'images'))
    opt['path']['experiments_root'] = str(folder / 'run')
    opt['datasets']['train'] |= {'num_worker_per_gpu': 1, 'prefetch_mode': 'cpu'}
    write_options(opt, folder / 'train.yml')
    (folder / 'first').mkdir()
    result = python('-m', 'dpmambair_basicsr.train', '-opt', '../train.yml', cwd=folder / 'first')
    assert result.returncode == 0, result.stdout
    assert 'iter:       2,' in result.stdout
    return folder / 'run'


def test_training_resumes_from_another_directory_in_two_processes(folder, trained):
    (folder / 'second').mkdir()
    command = (sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '-m', 'dpmambair_basicsr.train')
    options = ('-opt', folder / 'train.yml', '--launcher', 'pytorch', '--auto_resume')
    forced = ('--force_yml', 'train:total_iter=4', 'datasets:train:num_worker_per_gpu=0')
    result = run(*command, *options, *forced, cwd=folder / 'second')
    assert result.returncode == 0, result.stdout
    assert 'Start training from epoch: 0, iter: 2' in result.stdout
    assert 'iter:       3,' in result.stdout and 'iter:       2,' not in result.stdout
    assert sorted(path.name for path in (trained / 'training_states').iterdir()) == ['2.state', '4.state']
    assert not list((folder / 'second').iterdir())
    assert not list(folder.glob('run_archived*'))


def test_testing_writes_to_the_current_directory(folder, trained):
    opt = stock_options(write_images(folder / 'test images'))
    opt = {key: opt[key] for key in ('name', 'model_type', 'scale', 'num_gpu', 'network_g', 'val')} | {
        'datasets': {'test': opt['datasets']['val']},
        'path': {'pretrain_network_g': str(trained / 'models/net_g_latest.pth')},
    }
    opt['val'] |= {'save_img': True, 'suffix': None}
    write_options(opt, folder / 'test.yml')
    (folder / 'third').mkdir()
    result = python('-m', 'dpmambair_basicsr.test', '-opt', '../test.yml', cwd=folder / 'third')
    assert result.returncode == 0, result.stdout
    assert '# psnr:' in result.stdout
    images = folder / 'third/results/tiny/visualization/val set'
    assert sorted(path.name for path in images.iterdir()) == [f'{index}_tiny.png' for index in range(4)]


def test_a_wrong_option_ends_it_before_anything_is_written(tmp_path):
    opt = stock_options(write_images(tmp_path / 'images')) | {'model_type': 'SRMdel'}
    write_options(opt, tmp_path / 'wrong.yml')
    before = sorted(tmp_path.rglob('*'))
    result = python('-m', 'dpmambair_basicsr.train', '-opt', 'wrong.yml', cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout.endswith(
        'wrong.yml: 1 problem in the options:\n  model_type: unknown type SRMdel, did you mean SRModel?\n'
    )
    assert sorted(tmp_path.rglob('*')) == before
