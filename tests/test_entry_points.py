"""Our own entry points, as commands: they train, resume and test with BasicSR's loop, on CPUs and several of them."""

import os
import shlex
import shutil
import sys

import pytest
from support.commands import PACKAGE_PARENT, python, run, stock_options, warm_python, write_images, write_options

import dpmambair_basicsr


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('entry_points')


@pytest.fixture(scope='module')
def trained(folder):
    """The folder of a run of two iterations, in its own directory."""
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
    command = ('-m', 'torch.distributed.run', '--nproc_per_node=2', '-m', 'dpmambair_basicsr.train')
    options = ('-opt', folder / 'train.yml', '--launcher', 'pytorch', '--auto_resume')
    forced = ('--force_yml', 'train:total_iter=4', 'datasets:train:num_worker_per_gpu=0')
    result = warm_python(*command, *options, *forced, cwd=folder / 'second')
    assert result.returncode == 0, result.stdout
    assert 'Start training from epoch: 0, iter: 2' in result.stdout
    assert 'iter:       3,' in result.stdout and 'iter:       2,' not in result.stdout
    assert sorted(path.name for path in (trained / 'training_states').iterdir()) == ['2.state', '4.state']
    assert not list((folder / 'second').iterdir())
    assert not list(folder.glob('run_archived*'))


def test_the_short_name_of_a_command_trains_in_two_processes_too(folder, trained):
    (folder / 'short').mkdir()
    command = ('-m', 'torch.distributed.run', '--nproc_per_node=2', '-m', 'dpmambair_basicsr', 'train')
    own_run = f'path:experiments_root={folder / "short" / "run"}'
    options = ('-opt', folder / 'train.yml', '--launcher', 'pytorch', '--force_yml', own_run)
    result = warm_python(*command, *options, 'datasets:train:num_worker_per_gpu=0', cwd=folder / 'short')
    assert result.returncode == 0, result.stdout
    assert (folder / 'short/run/models/net_g_2.pth').is_file()


def test_testing_writes_to_the_current_directory(folder, trained):
    opt = stock_options(write_images(folder / 'test images'))
    opt = {key: opt[key] for key in ('name', 'model_type', 'scale', 'num_gpu', 'network_g', 'val')} | {
        'datasets': {'test': opt['datasets']['val']},
        'path': {'pretrain_network_g': str(trained / 'models/net_g_latest.pth')},
    }
    opt['val'] |= {'save_img': True, 'suffix': None}
    write_options(opt, folder / 'test.yml')
    (folder / 'third').mkdir()
    result = warm_python('-m', 'dpmambair_basicsr', 'test', '-opt', '../test.yml', cwd=folder / 'third')
    assert result.returncode == 0, result.stdout
    assert '# psnr:' in result.stdout
    images = folder / 'third/results/tiny/visualization/val set'
    assert sorted(path.name for path in images.iterdir()) == [f'{index}_tiny.png' for index in range(4)]


def test_a_wrong_option_is_refused_before_anything_is_written(tmp_path):
    opt = stock_options(write_images(tmp_path / 'images')) | {'model_type': 'SRMdel'}
    write_options(opt, tmp_path / 'wrong.yml')
    before = sorted(tmp_path.rglob('*'))
    result = warm_python('-m', 'dpmambair_basicsr.train', '-opt', 'wrong.yml', cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout.endswith(
        'wrong.yml: 1 problem in the options:\n  model_type: unknown type SRMdel, did you mean SRModel? (line 2)\n'
    )
    assert sorted(tmp_path.rglob('*')) == before


# Replaces the system's python3 of the given version; its virtual environments are empty and only record
# their commands.
PYTHON3 = """#!/bin/sh
if [ "$1" = -c ]; then
    exec {python} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
fi
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> "{log}"\\n[ "$1" != -c ]\\n' > "$3/bin/python"
chmod +x "$3/bin/python"
"""


@pytest.fixture(params=['', 'a b'])
def setup(request, tmp_path):
    """Runs scripts/setup_env.sh of a copy, in a path without and with a space; returns the outcome and the commands."""
    checkout = tmp_path / 'check' / request.param / 'out'
    (checkout / 'scripts').mkdir(parents=True)
    for name in ('pyproject.toml', 'setup.py', 'scripts/setup_env.sh'):
        shutil.copy(PACKAGE_PARENT / name, checkout / name)
    (tmp_path / 'bin').mkdir()

    def run_it(version):
        log, python3 = checkout / 'commands', tmp_path / 'bin' / 'python3'
        python3.write_text(PYTHON3.format(python=shlex.quote(sys.executable), version=version, log=log))
        python3.chmod(0o755)
        environment = {'PATH': f'{tmp_path}/bin{os.pathsep}{os.environ["PATH"]}', 'DPMAMBAIR_VENV': checkout / 'venv'}
        result = run('bash', 'scripts/setup_env.sh', cwd=checkout, **environment)
        return result, log.read_text() if log.exists() else ''

    run_it.checkout = checkout
    return run_it


def test_setup_works_in_any_path(setup):
    result, commands = setup((3, 12, 1))
    assert result.returncode == 0, result.stdout
    for part in ('--editable .[test]', '-m dpmambair_basicsr install_basicsr'):
        assert part in commands


def test_a_new_requirement_sets_up_again(setup):
    """Without changes, nothing is set up again."""
    _, once = setup((3, 12, 1))
    assert setup((3, 12, 1))[1] == once
    with open(setup.checkout / 'pyproject.toml', 'a') as stream:
        stream.write('# changed')
    assert setup((3, 12, 1))[1] == once * 2


def test_setup_refuses_other_pythons(setup):
    result, commands = setup((3, 9, 18))
    assert result.returncode != 0 and not commands
    assert 'Python 3.10 or newer is needed, python3 is 3.9\n' in result.stdout, result.stdout


def test_the_version_is_written_once():
    result = python('setup.py', '--version', cwd=PACKAGE_PARENT)
    assert result.stdout.splitlines()[-1] == dpmambair_basicsr.__version__
    for name in ('setup.py', 'pyproject.toml'):
        assert dpmambair_basicsr.__version__ not in (PACKAGE_PARENT / name).read_text()
