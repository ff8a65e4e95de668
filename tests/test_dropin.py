"""`dropin` makes the literal `python basicsr/train.py` work in BasicSR's own source; removal leaves no trace."""

import json
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.commands import (
    PACKAGE_PARENT,
    basicsr_source,
    python,
    stock_options,
    warm_python,
    write_images,
    write_options,
)

from dpmambair_basicsr.data.degradations import demo_strengths

SHIMS = ['basicsr/.dpmambair_dropin.json', 'basicsr/archs/dpmambair_arch.py', 'basicsr/basicsr.py']
SCAN = """
import importlib
from pathlib import Path

for file in Path(__file__).parent.glob('*_arch.py'):
    importlib.import_module(f'basicsr.archs.{file.stem}')
"""
OPTIONS = sorted(f'options/{file.name}' for file in (PACKAGE_PARENT / 'options').glob('*.*'))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return basicsr_source(tmp_path_factory.mktemp('source'))


@pytest.fixture
def checkout(source, tmp_path):
    return shutil.copytree(source, tmp_path / 'checkout')


@pytest.fixture
def small(source, tmp_path):
    """A project with the minimum that identifies it as BasicSR."""
    root = tmp_path / 'small'
    for folder, content in (('', 'from . import archs, models'), ('archs', SCAN), ('models', ''), ('utils', '')):
        (root / 'basicsr' / folder).mkdir(parents=True)
        (root / 'basicsr' / folder / '__init__.py').write_text(content)
    shutil.copy(source / 'basicsr/utils/registry.py', root / 'basicsr/utils')
    (root / 'basicsr/train.py').write_text(
        'import argparse\n\nimport basicsr\n\nargparse.ArgumentParser().parse_args()\n'
    )
    return root


def tree(folder: Path) -> dict[str, bytes | None]:
    """Path -> content, None for a folder."""
    paths = sorted(folder.rglob('*'))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def dropin(checkout, *arguments, python=warm_python, **environment):
    return python('-m', 'dpmambair_basicsr.dropin', checkout, *arguments, cwd=checkout.parent, **environment)


def test_installing_is_idempotent_and_removal_leaves_no_trace(small):
    before = tree(small)
    first = dropin(small)
    assert first.returncode == 0, first.stdout
    after = tree(small)
    assert sorted(after.keys() - before.keys()) == sorted([*SHIMS, 'options', *OPTIONS])
    assert {name: after[name] for name in before} == before
    assert all(f'wrote {small / name}' in first.stdout for name in (*SHIMS, *OPTIONS))
    report = first.stdout.partition(' uses\n')[2]
    assert f'  {small / "basicsr"}\n' in report
    assert f'  {PACKAGE_PARENT / "dpmambair_basicsr"}\n' in report  # found by PYTHONPATH

    assert dropin(small).returncode == 0
    assert tree(small) == after

    removed = dropin(small, '--remove')
    assert removed.returncode == 0, removed.stdout
    assert tree(small) == before
    again = dropin(small, '--remove')
    assert again.returncode != 0 and 'nothing to remove' in again.stdout


def test_files_of_the_user_are_kept(small):
    (small / 'options').mkdir()
    (small / 'options' / 'mine.yml').write_text('mine')
    before = tree(small)
    assert dropin(small).returncode == 0
    assert dropin(small, '--remove').returncode == 0
    assert tree(small) == before

    (small / 'options' / 'mine.yml').unlink()
    (small / 'options').rmdir()
    assert dropin(small).returncode == 0
    (small / 'options' / 'mine.yml').write_text('mine')
    assert f'kept {small / "options"}' in dropin(small, '--remove').stdout
    assert tree(small) == before


@pytest.mark.parametrize('name', [*SHIMS[1:], *OPTIONS[:1], 'options'])
def test_nothing_is_overwritten(small, name):
    (small / name).parent.mkdir(exist_ok=True)
    (small / name).write_text('mine')
    before = tree(small)
    result = dropin(small)
    assert result.returncode != 0 and 'nothing written' in result.stdout and name in result.stdout
    assert tree(small) == before


def test_changed_files_are_neither_removed_nor_updated(small):
    assert dropin(small).returncode == 0
    (small / OPTIONS[0]).write_text('mine now')
    before = tree(small)
    for arguments in ([], ['--remove']):
        result = dropin(small, *arguments)
        assert result.returncode != 0 and OPTIONS[0] in result.stdout
        assert tree(small) == before
    (small / OPTIONS[0]).unlink()  # moved away
    assert dropin(small, '--remove').returncode == 0


def test_our_files_are_updated(small):
    before = tree(small)
    assert dropin(small).returncode == 0
    after = tree(small)
    record = json.loads((small / SHIMS[0]).read_text())
    old = small / 'options' / 'train_of_an_older_version.yml'
    old.write_bytes((small / OPTIONS[0]).read_bytes())
    record['files'][f'options/{old.name}'] = record['files'][OPTIONS[0]]
    (small / SHIMS[0]).write_text(json.dumps(record))
    assert dropin(small).returncode == 0
    assert tree(small) == after
    assert dropin(small, '--remove').returncode == 0
    assert tree(small) == before


@pytest.mark.skipif(sys.version_info < (3, 11), reason='PYTHONSAFEPATH came with Python 3.11')
def test_a_safe_path_is_named_as_the_reason(small):
    """Python then omits the script's folder from sys.path and finds neither the project's BasicSR nor the launcher."""
    before = tree(small)
    (small.parent / 'installed/basicsr').mkdir(parents=True)
    (small.parent / 'installed/basicsr/__init__.py').touch()  # starts in less time than the real one
    path = f'{small.parent / "installed"}{os.pathsep}{PACKAGE_PARENT}'
    result = dropin(small, python=python, PYTHONSAFEPATH=1, PYTHONPATH=path)
    assert result.returncode != 0 and 'PYTHONSAFEPATH is set: unset it' in result.stdout
    assert tree(small) == before


@pytest.mark.parametrize(
    'file, content, said',
    [
        (
            'train.py',
            'import missing_here',
            "does not start here, without our files (ModuleNotFoundError: No module named 'm",
        ),
        (
            'train.py',
            'import os\nassert "dpmambair_arch.py" not in os.listdir(os.path.dirname(__file__) + "/archs")',
            'would no longer start: Assertion',
        ),
        ('train.py', 'pass', 'basicsr/train.py: ImportError: it does not import them'),
    ],
)
def test_a_project_that_would_not_start_or_has_nothing_of_ours_is_left_alone(small, file, content, said):
    (small / 'basicsr' / file).write_text(content)
    before = tree(small)
    result = dropin(small)
    assert result.returncode != 0 and said in result.stdout and result.stdout.count('\n') == 1, result.stdout
    assert tree(small) == before


def test_a_record_cannot_point_outside(small):
    outside = small.parent / 'outside'
    outside.touch()
    (small / SHIMS[0]).write_text(json.dumps({'files': {'../outside': 'e3b0'}, 'folders': []}))
    result = dropin(small, '--remove')
    assert result.returncode != 0 and '../outside' in result.stdout
    assert outside.exists()


def test_a_damaged_record_is_one_line_and_nothing_is_deleted(small):
    assert dropin(small).returncode == 0
    (small / SHIMS[0]).write_text('{"files": {')
    before = tree(small)
    for arguments in ([], ['--remove']):
        result = dropin(small, *arguments)
        assert result.returncode == 1 and result.stdout.startswith(f'{small / SHIMS[0]}: damaged; delete it')
        assert result.stdout.count('\n') == 1 and tree(small) == before


def test_the_literal_commands_run(checkout, tmp_path):
    """They use the checkout's BasicSR although another one is installed; our package is registered and patches it."""
    (checkout / 'basicsr/version.py').unlink()  # as in a raw clone
    (checkout / 'VERSION').write_text('1.4.2+this.checkout\n')
    files = tree(checkout)
    assert dropin(checkout).returncode == 0
    opt = stock_options(write_images(tmp_path / 'images'))
    opt['train']['pixel_opt'] = {'type': 'FFTLoss', 'loss_weight': 1.0}  # names something of ours
    opt['datasets']['train']['batch_size_per_gpu'] = 3  # of four images: BasicSR plans too few epochs
    write_options(opt, checkout / 'options' / 'x.yml')
    result = python('basicsr/train.py', '-opt', 'options/x.yml', cwd=checkout, PYTHONDONTWRITEBYTECODE='')
    assert result.returncode == 0, result.stdout  # with AdamW, which needs our patch
    assert 'BasicSR: 1.4.2+this.checkout' in result.stdout
    assert (checkout / 'experiments/tiny/training_states/2.state').is_file()

    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    resume = ('-opt', checkout / 'options/x.yml', '--auto_resume', '--force_yml', 'train:total_iter=8')
    result = warm_python(checkout / 'basicsr/train.py', *resume, cwd=elsewhere)
    assert result.returncode == 0, result.stdout
    assert 'Start training from epoch: 1, iter: 2' in result.stdout
    assert 'iter:       3,' in result.stdout and 'iter:       2,' not in result.stdout
    assert (checkout / 'experiments/tiny/training_states/8.state').is_file()
    assert not list(elsewhere.iterdir()) and [path.name for path in (checkout / 'experiments').iterdir()] == ['tiny']

    opt |= {'model_type': 'RestorationMdel', 'val': {'save_img': True, 'suffix': None}}
    write_options(opt, checkout / 'options' / 'wrong.yml')
    wrong = 'model_type: unknown type RestorationMdel, did you mean RestorationModel?'
    python_path = {'PYTHONPATH': f'.:{PACKAGE_PARENT}'}
    for command, environment in ((['basicsr/test.py'], python_path), (['-m', 'basicsr.train'], {})):
        result = warm_python(*command, '-opt', 'options/wrong.yml', cwd=checkout, **environment)
        assert result.returncode != 0 and wrong in result.stdout, result.stdout

    (checkout / 'options/x.yml').unlink()
    (checkout / 'options/wrong.yml').unlink()
    assert dropin(checkout, '--remove').returncode == 0
    left = tree(checkout)
    assert {name: left[name] for name in files} == files
    made = {name for name in left.keys() - files.keys() if '__pycache__' not in name}
    assert {name.split('/')[0] for name in made} == {'experiments'}
    assert not any('dpmambair' in name or name.startswith('basicsr/__pycache__/basicsr.') for name in left)


def test_a_copy_of_an_arch_file_is_what_a_checkout_builds(checkout):
    for name in ('vmambair_arch.py', 'dpmambair_arch.py'):
        shutil.copy(PACKAGE_PARENT / 'dpmambair_basicsr/archs' / name, checkout / 'basicsr/archs')
    small = {'dim': 16, 'num_blocks': [1] * 4, 'num_refinement_blocks': 1}
    script = f"""
import dpmambair_basicsr
from basicsr.archs import build_network
for name, more in {{'VmambaIR': {{}}, 'DPMambaIR': {{'d_inner': [8] * 4}}}}.items():
    for alias in (name, f'dpmambair_{{name}}'):
        print(type(build_network({{'type': alias, **{small}, **more}})).__module__)
"""
    result = warm_python('-c', script, cwd=checkout)
    assert result.returncode == 0, result.stdout
    built = [line for line in result.stdout.splitlines() if line.endswith('_arch')]
    names = ('vmambair_arch', 'dpmambair_arch')
    assert built[::2] == [f'basicsr.archs.{name}' for name in names], 'the plain name is the copy'
    assert len(built) == 4


def test_dpmambair_trains_and_tests_in_a_checkout(checkout):
    """Stage 1 and the two commands of the README, with the shipped option files, reduced."""
    before = tree(checkout)
    assert dropin(checkout).returncode == 0
    rng = np.random.default_rng(0)
    data = checkout / 'datasets' / 'all_in_one'
    folders = [
        f'{phase}/{kind}/{side}' for phase in ('train', 'test') for kind in demo_strengths() for side in ('LQ', 'GT')
    ]
    for folder in (*folders, 'train/clean'):
        (data / folder).mkdir(parents=True)
        for number in range(2):
            image = rng.integers(0, 256, (27, 34, 3), dtype=np.uint8)
            assert cv2.imwrite(str(data / folder / f'{number}.png'), image)

    extractor = 'embed_dim=8'
    network = ['dim=16', 'num_blocks=[1,1,1,1]', 'num_refinement_blocks=1', 'd_inner=[8,8,8,8]', 'd_state=2', extractor]
    small = ['total_iter=1', 'scheduler:periods=[1]', 'lpips_opt=~']
    loader = ['gt_size=16', 'progressive=~', 'batch_size_per_gpu=2', 'num_worker_per_gpu=0']
    train = [f'train:{x}' for x in small] + [f'datasets:train:{x}' for x in loader] + ['val:val_freq=1']
    for script, options, reduced in (
        ('train', 'train_degradation_extractor', [*train, f'network_g:{extractor}']),
        ('train', 'train_dpmambair', [*train, *(f'network_g:{x}' for x in network)]),
        ('test', 'test_gopro', [f'network_g:{x}' for x in network]),
    ):
        command = (f'basicsr/{script}.py', '-opt', f'options/{options}.yml', '--force_yml', *reduced)
        result = warm_python(*command, cwd=checkout)
        assert result.returncode == 0, result.stdout
        assert 'Validation GoPro' in result.stdout
    for name in ('train_degradation_extractor', 'train_dpmambair'):  # the check of the options has not opened the log
        (log,) = (checkout / 'experiments' / name).glob('train_*.log')
        assert 'End of training' in log.read_text()
    assert len(list((checkout / 'results/test_gopro/visualization/GoPro').glob('*.png'))) == 2

    assert dropin(checkout, '--remove').returncode == 0
    for made in ('datasets', 'experiments', 'results', 'tb_logger'):
        shutil.rmtree(checkout / made)
    assert tree(checkout) == before
