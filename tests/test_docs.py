"""Every command and code block in README.md and docs/ works, on small images."""

import glob
import inspect
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
import yaml
from support.commands import PACKAGE_PARENT
from support.metadata import name_of, pyproject
from support.pipelines import write_pairs

from dpmambair_basicsr.archs import DegradationAutoencoder, DegradationExtractor, DPMambaIR, VmambaIR

PAGES = [PACKAGE_PARENT / 'README.md', *sorted((PACKAGE_PARENT / 'docs').glob('*.md'))]
SMALL = {'dim': 16, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
SMALL_DPMAMBAIR = {**SMALL, 'd_inner': [16, 16, 16, 16], 'embed_dim': 8, 'extractor_channels': [4, 4]}
LESS_TRAINING = ('train:total_iter=2', 'val:val_freq=2', 'logger:save_checkpoint_freq=2', 'datasets:train:gt_size=16')
LESS_TRAINING += ('datasets:train:num_worker_per_gpu=0', 'num_gpu=0')


def code_blocks(page: Path, language: str) -> list[str]:
    """Including those in lists, dedented."""
    found = re.findall(rf'^( *)```{language}\n(.*?)^ *```', page.read_text(encoding='utf-8'), re.S | re.M)
    return [re.sub(rf'^{indent}', '', block, flags=re.M) for indent, block in found]


def commands(page: Path) -> list[list[str]]:
    lines = '\n'.join(code_blocks(page, 'bash')).replace('\\\n', ' ').splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def all_commands() -> list[list[str]]:
    return [command for page in PAGES for command in commands(page)]


def test_relative_links_are_valid():
    for page in PAGES:
        for target in re.findall(r'\]\((?!https?://)([^)#]+)', page.read_text(encoding='utf-8')):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


def test_every_guarantee_names_an_existing_test():
    """A row of docs/reliability.md ends with tests: files, and prefixes of names in the preceding file."""
    tests = {
        file.name: re.findall(r'^def (test_\w+)', file.read_text(), re.M) for file in Path(__file__).parent.glob('*.py')
    }
    rows = re.findall(r'^\|.*\| ([^|]*) \|$', (PACKAGE_PARENT / 'docs/reliability.md').read_text(), re.M)
    assert len(rows) > 50
    for row in rows:
        if row in ('shown by', '---'):
            continue
        file, names = '', re.findall('`([^`]+)`', row)
        assert names, row
        for name in names:
            file, beginning = name.split('::') if '::' in name else (name, '') if name.endswith('.py') else (file, name)
            pattern = re.escape(beginning).replace(r'\.\.\.', r'\w*')
            assert any(re.match(pattern, test) for test in tests[file]), name


def test_what_a_page_installs_is_one_of_our_requirements():
    """The commands themselves: test_packaging.py."""
    project = pyproject()['project']
    ours = {name_of(word) for extra in project['optional-dependencies'].values() for word in extra}
    for command in all_commands():
        if command[:2] == ['pip', 'install'] and not any(word.startswith('-') for word in command):
            assert {name_of(word) for word in command[2:]} <= ours | {'setuptools', 'wheel', 'cython'}, command


def test_other_commands_name_existing_files_and_modules():
    """Run by other tests: option files (test_experiments.py), the demo (test_demo.py), BasicSR's (test_dropin.py)."""
    for command in all_commands():
        if '-opt' in command:
            assert (PACKAGE_PARENT / command[command.index('-opt') + 1]).is_file(), command
        if command[0] == 'bash':
            assert (PACKAGE_PARENT / command[1]).is_file(), command


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The files that a reader of these pages has, as far as their commands need them."""
    shutil.copytree(PACKAGE_PARENT / 'options', tmp_path / 'options')
    for part in ('train', 'test'):
        write_pairs(tmp_path / 'datasets/your_own' / part, [(24, 24), (20, 27)])
    for name in ('pictures/a.png', 'more/b.jpg'):
        (tmp_path / name).parent.mkdir()
        assert cv2.imwrite(str(tmp_path / name), skimage.data.astronaut()[:30, :41, ::-1])
    torch.manual_seed(0)
    net = {'network_g': {'type': 'DPMambaIR', **SMALL_DPMAMBAIR}, 'params': DPMambaIR(**SMALL_DPMAMBAIR).state_dict()}
    for file in (tmp_path / 'net_g_latest.pth', tmp_path / 'experiments/demo_dpmambair/models/net_g_latest.pth'):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net, file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_module(command: list[str]) -> list[str]:
    """`dpmambair command` is short for `python -m dpmambair_basicsr.command`."""
    return ['python', '-m', f'dpmambair_basicsr.{command[1]}', *command[2:]] if command[0] == 'dpmambair' else command


def run(command: list[str]) -> None:
    """`python -m module ...`, or `dpmambair command ...`, in this process."""
    command = as_module(command)
    words = [path for word in command for path in (sorted(glob.glob(word)) if '*' in word else [word])]
    assert words[:2] == ['python', '-m'], command
    saved = sys.argv
    sys.argv = words[2:]
    try:
        runpy.run_module(words[2], run_name='__main__', alter_sys=True)
    except SystemExit as end:
        assert not end.code, f'{command}: {end.code}'
    finally:
        sys.argv = saved


def forced(command: list[str], *values: str) -> list[str]:
    """With additional values of --force_yml, which takes all arguments after it."""
    return [*command, *(() if '--force_yml' in command else ('--force_yml',)), *values]


def test_train_your_own_page_runs(project):
    network = [f'network_g:{key}={value}'.replace(' ', '') for key, value in SMALL.items()]
    seen = []
    for command in commands(PACKAGE_PARENT / 'docs/train_your_own.md'):
        if command[2].endswith('.train'):
            # 30000 iterations become 3; the schedule on the page must change accordingly.
            short = [re.sub('30000|800', '3', word) for word in command if word.startswith('train:')]
            command = [word for word in command if not word.startswith('train:')]
            command = [*forced(command, *LESS_TRAINING, 'train:scheduler:periods=[2]'), *network, *short]
        elif command[2].endswith('.test'):
            command = forced(command, *network, 'num_gpu=0')
        run(command)
        seen.append(command[2].rsplit('.', 1)[1])
    assert seen == ['train', 'train', 'train', 'test', 'report', 'restore']
    models = project / 'experiments/train_your_own/models'
    assert {file.name for file in models.iterdir()} >= {'net_g_2.pth', 'net_g_latest.pth', 'net_g_best.pth'}
    assert (project / 'experiments/train_on_cpu/models/net_g_latest.pth').is_file()
    assert '<html' in (project / 'report.html').read_text(encoding='utf-8')
    restored, degraded = (
        cv2.imread(str(project / folder / '01.png')) for folder in ('restored', 'datasets/your_own/test/LQ')
    )
    assert restored.shape == degraded.shape and (restored != degraded).any()


@pytest.mark.parametrize('kind', ['SyntheticDegradationDataset', 'MixedDegradationDataset'])
def test_training_sets_of_the_page_train(kind, project):
    """The sections for clean images only and for several folders pass the check of options and train."""
    blocks = code_blocks(PACKAGE_PARENT / 'docs/train_your_own.md', 'yaml')
    (section,) = (block for block in blocks if f'type: {kind}' in block)
    opt = yaml.safe_load((project / 'options/train_your_own.yml').read_text())
    opt['datasets'] |= yaml.safe_load(section)
    opt['network_g'] |= SMALL
    (project / 'own.yml').write_text(yaml.safe_dump(opt))
    run(forced(['python', '-m', 'dpmambair_basicsr.train', '-opt', 'own.yml'], *LESS_TRAINING))
    assert (project / 'experiments/train_your_own/models/net_g_latest.pth').is_file()


def test_restoring_and_reports_of_the_readme_run(project):
    readme = commands(PACKAGE_PARENT / 'README.md')
    for name in ('test_all_in_one', 'another'):
        opt = yaml.safe_load((project / 'options/test_your_own.yml').read_text()) | {'name': name, 'num_gpu': 0}
        opt['network_g'] |= SMALL
        torch.save({'params_ema': VmambaIR(**SMALL).state_dict()}, project / 'own.pth')
        opt['path']['pretrain_network_g'] = 'own.pth'
        (project / f'{name}.yml').write_text(yaml.safe_dump(opt))
        run(['python', '-m', 'dpmambair_basicsr.test', '-opt', f'{name}.yml'])
    for command in map(as_module, readme):
        if {'dpmambair_basicsr.restore', 'dpmambair_basicsr.report'} & {*command}:
            run(command)
    assert {file.name for file in (project / 'restored').iterdir()} == {'a.png', 'b.jpg'}
    assert (project / 'report.html').is_file()


def test_page_about_the_extractor_runs(project):
    pytest.importorskip('matplotlib')
    (project / 'photos').mkdir()
    for name in ('coffee', 'chelsea'):
        assert cv2.imwrite(str(project / 'photos' / f'{name}.png'), getattr(skimage.data, name)()[:64, :64, ::-1])
    (command,) = (words for words in commands(PACKAGE_PARENT / 'docs/degradation.md') if words[0] == 'python')
    run(command)
    assert cv2.imread('map.png') is not None


def test_figures_page_runs(project):
    pytest.importorskip('matplotlib')
    for kind in ('rain', 'noise'):
        write_pairs(project / 'datasets/all_in_one/test' / kind, [(24, 32)] * 2)
        parent = project / 'datasets/all_in_one/test' / kind
        assert {file.name for file in parent.iterdir()} == {'LQ', 'GT'}
    shutil.copy('net_g_latest.pth', 'without_heb.pth')
    stage_1 = {'embed_dim': 8, 'extractor_channels': [4, 4], 'channels': 4}
    net = {'type': 'DegradationAutoencoder', **stage_1}
    torch.save({'network_g': net, 'params': DegradationAutoencoder(**stage_1).state_dict()}, 'stage1.pth')
    for command in commands(PACKAGE_PARENT / 'docs/figures.md'):
        if command[0] == 'python':
            run(command)
            drawing = project / command[command.index('-o') + 1]
            assert cv2.imread(str(drawing)) is not None and drawing.with_suffix('.csv').stat().st_size > 100


def test_the_page_about_dpmambair_gives_the_defaults():
    page = (PACKAGE_PARENT / 'docs/dpmambair.md').read_text(encoding='utf-8')
    network, extractor = (inspect.signature(kind).parameters for kind in (DPMambaIR, DegradationExtractor))
    for name, text in {'d_inner': 'd_inner {}, ', 'dim': 'dim {}, ', 'd_state': ', {} states'}.items():
        default = network[name].default
        assert text.format(', '.join(map(str, default if name == 'd_inner' else [default]))) in page
    widths = ', '.join(map(str, extractor['channels'].default))
    assert f'| {widths}; layers two and three halve; mean; linear to {extractor["hidden"].default}, ReLU' in page
    assert f'(`delta_prompt: {network["delta_prompt"].default}`)' in page


def test_python_of_the_readme_runs(project):
    picture = cv2.cvtColor(cv2.imread('pictures/a.png'), cv2.COLOR_BGR2RGB)
    by_load, by_class = code_blocks(PACKAGE_PARENT / 'README.md', 'python')
    values = {'image': torch.rand(1, 3, 16, 24)}
    with torch.no_grad():
        exec(by_class, values)
    assert values['restored'].shape == (1, 3, 16, 24)
    values = {'image': picture}
    exec(by_load, values)
    assert values['restored'].shape == picture.shape and values['restored'].dtype == np.uint8


def test_migration_page_runs(project):
    """A published checkpoint contains parameters only."""
    page = PACKAGE_PARENT / 'docs/migration.md'
    opt = yaml.safe_load((project / 'options/test_vmambair_derain.yml').read_text())
    for dataset in opt['datasets'].values():
        write_pairs(project / Path(dataset['dataroot_gt']).parent, [(16, 16)])
    net = {key: value for key, value in opt['network_g'].items() if key != 'type'}
    torch.save({'params': VmambaIR(**net).state_dict()}, project / 'published.pth')
    test, restore = commands(page)
    run(forced(test, 'num_gpu=0'))
    run(restore)
    assert cv2.imread('restored/a.png').shape == (30, 41, 3)
    for row in re.findall(r'^\| .*`type: VmambaIR.*$|^\| .*`scale: 4.*$', page.read_text(encoding='utf-8'), re.M):
        values = yaml.safe_load('{' + ', '.join(re.findall(r'`(\w+: [^`]+)`', row)) + '}')
        for name in re.findall(r'`((?:train|test)_vmambair_\w+\.yml)`', row):
            network = yaml.safe_load((PACKAGE_PARENT / 'options' / name).read_text())['network_g']
            defaults = {'scale': 1, 'channel_scan': 'lifted', 'channel_fusion': 'add', 'type': 'VmambaIR'}
            assert values.items() <= (defaults | network).items(), name
