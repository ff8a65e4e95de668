"""docs/adding.md: its additions are applied to a copy of the package as described, and the affected commands run."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from support.commands import PACKAGE_PARENT, warm_python
from test_demo import demo_commands
from test_docs import code_blocks

pytest.importorskip('skimage', reason='its photographs are the images')
pytest.importorskip('sklearn', reason='its photographs are the images')

PAGE = PACKAGE_PARENT / 'docs' / 'adding.md'
HEAD = re.compile(r'# (dpmambair_basicsr/\S+\.py)(?:, in (\w+))?\n')


def add(block: str, folder: Path) -> None:
    """Applies a block of the page."""
    path, table = HEAD.match(block).groups()
    file, text = folder / path, HEAD.sub('', block, count=1)
    if table is None:
        before = file.read_text(encoding='utf-8') + '\n\n' if file.exists() else ''
        file.write_text(before + text, encoding='utf-8')
    else:
        source = file.read_text(encoding='utf-8')
        changed, places = re.subn(
            rf'^({table} = {{\n(?:    .*\n)*)}}', rf'\1    {text.strip()}\n}}', source, flags=re.M
        )
        assert places == 1, f'{path} has no table {table}'
        file.write_text(changed, encoding='utf-8')


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """The package with all additions of the page, and the demo's images and stage 1 created with it."""
    folder = tmp_path_factory.mktemp('adding')
    for part in ('dpmambair_basicsr', 'options', 'scripts'):
        # With numba's cache, or the kernels would be compiled again.
        shutil.copytree(PACKAGE_PARENT / part, folder / part, ignore=shutil.ignore_patterns('*.pyc'))
    for block in code_blocks(PAGE, 'python'):
        add(block, folder)
        ast.parse((folder / HEAD.match(block)[1]).read_text(encoding='utf-8'))
    for name, *arguments in demo_commands():
        run(folder, *(('-m', f'dpmambair_basicsr.{name}') if name in ('train', 'test') else (name,)), *arguments)
    return folder


def run(folder: Path, *command) -> str:
    done = warm_python(*command, cwd=folder, PYTHONPATH=folder)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_kind_of_the_title_is_added():
    kinds = 'data/degradations', 'archs/examplenet_arch', 'losses/', 'models/', 'ops/selective_scan/'
    heads = [HEAD.match(block)[1] for block in code_blocks(PAGE, 'python')]
    assert all(any(head.startswith(f'dpmambair_basicsr/{kind}') for head in heads) for kind in kinds)


def test_the_demo_has_the_degradation_and_ends_with_its_table(copy):
    assert [len(list((copy / f'datasets/demo/test/sepia/{part}').glob('*.png'))) for part in ('LQ', 'GT')] == [3, 3]
    assert not (copy / 'datasets/demo/test/fog').exists(), 'has no function'
    table = (copy / 'results/demo/table.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| \w+ +\|.* dB \|$', table, re.M)
    assert len(rows) == 7 + 1, 'what the option file of the test lists, and the average'
    assert re.search(r'of 192 images .* chance: 12%', table), 'stage 1 has eight classes: 8 kinds x 8 versions x 3'


def test_the_viewer_knows_the_degradation(copy):
    weights = 'experiments/demo_degradation_extractor/models/net_g_latest.pth'
    clean = ('--clean', 'datasets/demo/test/haze/GT', '--device', 'cpu')
    printed = run(copy, '-m', 'dpmambair_basicsr.degradation', '-w', weights, 'datasets/demo/test/sepia/LQ', *clean)
    assert '10 classes, 30 reference pictures' in printed and printed.count('sepia/LQ') == 3


def test_option_files_can_name_everything_and_the_report_shows_it(copy):
    clean = str(copy / 'datasets/demo/test/sepia/GT')
    common = {'name': 'adding', 'scale': 1, 'num_gpu': 0, 'network_g': {'type': 'ExampleNet', 'dim': 4}}
    common |= {'model_type': 'NoisyInputModel', 'scan_backend': 'double', 'manual_seed': 0}
    training = {'type': 'SyntheticDegradationDataset', 'degradations': {'sepia': {'strength': 1.0}}}
    training |= {'name': 'x', 'dataroot_gt': clean, 'gt_size': 16, 'batch_size_per_gpu': 1, 'num_worker_per_gpu': 0}
    train = {
        'total_iter': 2,
        'input_noise': 0.02,
        'optim_g': {'type': 'AdamW', 'lr': 1e-3},
        'scheduler': {'type': 'MultiStepLR', 'milestones': [9]},
        'edge_opt': {'type': 'EdgeLoss', 'loss_weight': 0.1},
    }
    logger = {'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': False}
    options = common | {'datasets': {'train': training}, 'path': {}, 'train': train, 'logger': logger}
    (copy / 'train.yml').write_text(yaml.safe_dump(options))
    assert 'l_edge: ' in run(copy, '-m', 'dpmambair_basicsr.train', '-opt', 'train.yml')

    pairs = {'type': 'PairedDegradationDataset', 'dataroot_gt': clean, 'dataroot_lq': clean.replace('GT', 'LQ')}
    sets = {f'test_{kind}': pairs | {'name': kind, 'degradation': kind} for kind in ('sepia', 'fog')}
    metrics = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}
    options = common | {'datasets': sets, 'val': {'save_img': True, 'suffix': None, 'metrics': metrics}}
    options |= {'path': {'pretrain_network_g': 'experiments/adding/models/net_g_latest.pth'}}
    (copy / 'test.yml').write_text(yaml.safe_dump(options))
    run(copy, '-m', 'dpmambair_basicsr.test', '-opt', 'test.yml')
    rows = json.loads((copy / 'results/adding/results.json').read_text(encoding='utf-8'))
    assert {'sepia', 'fog'} <= set(re.findall(r'\w+', json.dumps(rows)))
    run(copy, '-m', 'dpmambair_basicsr.report', 'results/adding', '--html', 'report.html')
    page = (copy / 'report.html').read_text(encoding='utf-8')
    assert 'sepia' in page and 'fog' in page


def test_a_mistake_in_the_new_keys_is_named(copy):
    opt = yaml.safe_load((copy / 'options/demo_degradation_extractor.yml').read_text(encoding='utf-8'))
    opt['model_type'] = 'NoisyInputModel'
    opt['train'] |= {'input_noise': 2, 'edge_opt': {'type': 'EdgeLos'}}
    opt['datasets']['train']['degradations'] = {'sepia': {'strength': 3}}
    (copy / 'wrong.yml').write_text(yaml.safe_dump(opt))
    done = warm_python('-m', 'dpmambair_basicsr.train', '-opt', 'wrong.yml', cwd=copy, PYTHONPATH=copy)
    assert done.returncode == 1
    for problem in (
        r'train.input_noise: .* in \[0, 1\]',
        'did you mean EdgeLoss',
        'sepia: strength',
    ):
        assert re.search(problem, done.stdout), (problem, done.stdout)


def test_the_schema_is_regenerated(copy):
    run(copy, '-m', 'dpmambair_basicsr.option_checks.json_schema')
    schema = (copy / 'options/dpmambair.schema.json').read_text(encoding='utf-8')
    assert all(
        word in schema for word in ('fog', 'ExampleNet', 'EdgeLoss', 'NoisyInputModel', 'input_noise', '"double"')
    )


def test_the_backend_passes_the_tests_of_all_backends(copy):
    shutil.copytree(PACKAGE_PARENT / 'tests' / 'ops', copy / 'ops_tests')
    asked = ('-q', '-p', 'no:cacheprovider', 'ops_tests/test_selective_scan.py', '-k', 'double-cpu')
    printed = run(copy, '-m', 'pytest', *asked)
    assert int(re.search(r'(\d+) passed', printed)[1]) > 40
