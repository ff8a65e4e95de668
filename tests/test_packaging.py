"""What pip installs, and the commands by their short names."""

import ast
import re
import shutil
import sys
import zipfile

import pytest
import yaml
from support.commands import PACKAGE_PARENT, python
from support.metadata import name_of, pyproject

import dpmambair_basicsr
from dpmambair_basicsr.__main__ import COMMANDS, MODULES
from dpmambair_basicsr.inference.restorer import SHIPPED_WEIGHTS


def test_every_command_of_the_package_is_listed(tmp_path):
    with_main = {
        file.stem
        for file in (PACKAGE_PARENT / 'dpmambair_basicsr').glob('*.py')
        if any(isinstance(node, ast.FunctionDef) and node.name == 'main' for node in ast.parse(file.read_text()).body)
    }
    assert set(COMMANDS) == with_main - {'__main__'} | set(MODULES)
    result = python('-m', 'dpmambair_basicsr', '--help', cwd=tmp_path)
    assert result.returncode == 0
    for name, line in COMMANDS.items():
        assert re.search(rf'^ +{name} +{re.escape(line)}$', result.stdout, re.M), result.stdout


def test_a_command_takes_its_arguments_and_gives_its_exit_status(tmp_path):
    result = python('-m', 'dpmambair_basicsr', 'dropin', '--remove', 'nowhere', cwd=tmp_path)
    assert result.returncode == 1 and 'nowhere: nothing to remove' in result.stdout


@pytest.mark.parametrize('arguments', [(), ('restroe', '--help')])
def test_anything_but_a_command_is_refused_with_the_choices(arguments, tmp_path):
    result = python('-m', 'dpmambair_basicsr', *arguments, cwd=tmp_path)
    assert result.returncode == 2 and 'COMMAND' in result.stdout


@pytest.mark.parametrize(
    'command', ['', 'convert', 'dropin', 'init', 'install_basicsr', 'push', 'report', 'run', 'study', 'verify']
)
def test_help_imports_neither_pytorch_nor_basicsr(command, tmp_path):
    code = f"""
import sys
from dpmambair_basicsr.__main__ import main
sys.argv = ['dpmambair', *{command.split()}, '--help']
try:
    main()
except SystemExit as end:
    assert not end.code
assert not {{'torch', 'basicsr'}} & set(sys.modules)
"""
    result = python('-c', code, cwd=tmp_path)
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
    """The wheel and the source distribution, built from the files that git tracks."""
    folder = tmp_path_factory.mktemp('distributions')
    for name in ('dpmambair_basicsr', 'options'):
        shutil.copytree(PACKAGE_PARENT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('LICENSE', 'README.md', 'pyproject.toml', 'setup.py'):
        shutil.copy(PACKAGE_PARENT / name, folder / name)
    built = python('-m', 'build', '--no-isolation', '.', cwd=folder)
    assert built.returncode == 0, built.stdout
    (wheel,), (source,) = folder.glob('dist/*.whl'), folder.glob('dist/*.tar.gz')
    return wheel, source


def test_the_wheel_holds_the_modules_the_option_files_and_the_command(distributions):
    wheel, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith('entry_points.txt'))
        assert 'dpmambair = dpmambair_basicsr.__main__:main' in archive.read(entry_points).decode()
    folder = PACKAGE_PARENT / 'options'
    options = {f'dpmambair_basicsr/option_files/{file.relative_to(folder)}' for file in folder.rglob('*.*')}
    package = PACKAGE_PARENT / 'dpmambair_basicsr'
    files = {str(file.relative_to(PACKAGE_PARENT)) for file in package.rglob('*.*') if '__pycache__' not in file.parts}
    metadata = {name for name in names if '.dist-info/' in name}
    assert options and names - metadata == options | {name for name in files if (PACKAGE_PARENT / name).is_file()}
    assert f'-{dpmambair_basicsr.__version__}-' in wheel.name
    weights = {f'dpmambair_basicsr/weights/{name}' for name in ('README.md', 'ATTRIBUTION.md', SHIPPED_WEIGHTS.name)}
    assert weights <= names, 'the attribution has to travel with the weights'


def test_a_wheel_can_be_built_from_the_source_distribution(distributions, tmp_path):
    wheel, source = distributions
    built = python('-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', '.', source, cwd=tmp_path)
    assert built.returncode == 0, built.stdout
    (again,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_a_module_that_only_an_earlier_version_had_is_not_installed(distributions, tmp_path):
    wheel, _ = distributions
    checkout = shutil.copytree(wheel.parents[1], tmp_path / 'checkout')
    earlier = checkout / 'build/lib/dpmambair_basicsr/of_an_earlier_version.py'
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    built = python('-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', '.', checkout, cwd=tmp_path)
    assert built.returncode == 0, built.stdout
    (again,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_an_index_takes_both_and_its_page_has_no_dead_links(distributions):
    checked = python('-m', 'twine', 'check', '--strict', *distributions, cwd=distributions[0].parent)
    assert checked.returncode == 0, checked.stdout
    with zipfile.ZipFile(distributions[0]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        text = archive.read(name).decode()
    assert '# dpmambair_basicsr' in text
    targets = re.findall(r'\]\(([^)]+)\)|(?:src|href)="([^"]*)"', text)
    assert targets and all((link or source).startswith('https://') for link, source in targets)


@pytest.mark.parametrize('page', ['README.md', 'docs/install.md'])
def test_the_pages_give_the_install_commands_of_the_setup_script(page):
    """One for restoring, two for training; the script's have the extra `test`, which includes `train`."""
    blocks = re.findall(r'```bash\n(pip install -e.*?)```', (PACKAGE_PARENT / page).read_text('utf-8'), re.S)
    assert blocks == ['pip install -e .\n', "pip install -e '.[train]'\ndpmambair install_basicsr\n"]
    script, extras = (
        (PACKAGE_PARENT / 'scripts/setup_env.sh').read_text('utf-8'),
        pyproject()['project']['optional-dependencies'],
    )
    assert re.search(r"install --editable '\.\[test\]'\n.*\n.* -m dpmambair_basicsr install_basicsr ", script)
    (of_this_package,) = (word for word in extras['test'] if word.startswith('dpmambair_basicsr['))
    assert 'train' in of_this_package.partition('[')[2].rstrip(']').split(',')


def test_what_the_pages_say_an_optional_feature_needs_is_one_of_our_extras():
    extras = pyproject()['project']['optional-dependencies']
    known = {frozenset(map(name_of, requirements)) for requirements in extras.values()}
    rows = re.findall(r'^\| `pip install ([^`]+)` \|', (PACKAGE_PARENT / 'docs/install.md').read_text('utf-8'), re.M)
    assert len(rows) >= 5
    for row in rows:
        assert frozenset(row.split()) in known, row


def test_every_library_that_the_package_imports_is_one_of_its_requirements():
    project = pyproject()['project']
    everything = sum(project['optional-dependencies'].values(), project['dependencies'])
    distributions = {'cv2': 'opencv-python', 'PIL': 'pillow', 'yaml': 'pyyaml', 'skimage': 'scikit-image'}
    distributions |= {
        'sklearn': 'scikit-learn',
        'cuda': 'torch',
        'selective_scan_cuda': 'mamba-ssm',
        'llvmlite': 'numba',
    }
    required = {name_of(requirement).replace('_', '-') for requirement in everything}
    # BasicSR by install_basicsr, which asks pip for its index; pyiqa where the user has it, see metrics/iqa.py
    ours = {'dpmambair_basicsr', 'basicsr', 'pip', 'pyiqa'}
    for file in (PACKAGE_PARENT / 'dpmambair_basicsr').rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition('.')[0] for name in names} - sys.stdlib_module_names - ours:
                assert distributions.get(name, name).replace('_', '-') in required, f'{file}: {name}'


def test_the_picture_of_the_layers_shows_the_layers_that_are_checked():
    contracts = pyproject()['tool']['importlinter']['contracts']
    (layers,) = (contract['layers'] for contract in contracts if contract['type'] == 'layers')
    (picture,) = re.findall(r'```mermaid\n(.*?)```', (PACKAGE_PARENT / 'CONTRIBUTING.md').read_text('utf-8'), re.S)
    labels = dict(re.findall(r'^ *(\w+)\["(.*)"\]$', picture, re.M))
    (arrows,) = re.findall(r'^ *(\w+(?: --> \w+)+)$', picture, re.M)
    assert [labels[name] for name in arrows.split(' --> ')] == layers


def test_the_tree_in_contributing_is_the_tree():
    page = (PACKAGE_PARENT / 'CONTRIBUTING.md').read_text('utf-8')
    (tree,) = re.findall(r'^dpmambair_basicsr/\n(.*?)^options/', page, re.S | re.M)
    package = PACKAGE_PARENT / 'dpmambair_basicsr'
    for folder in (path.name for path in package.iterdir() if path.is_dir() and path.name != '__pycache__'):
        assert f'{folder}/' in tree, folder
    for name in re.findall(r'(\w+)(?:/|\.py)', tree):
        assert list(package.rglob(name)) or list(package.rglob(f'{name}.py')), name


def test_the_versions_of_python_are_the_same_everywhere():
    project, workflow = pyproject()['project'], PACKAGE_PARENT / '.github/workflows/tests.yml'
    tested = yaml.safe_load(workflow.read_text('utf-8'))['jobs']['tests']['strategy']['matrix']['python-version']
    assert project['requires-python'] == f'>={tested[0]}'
    prefix = 'Programming Language :: Python :: '
    assert [name.removeprefix(prefix) for name in project['classifiers'] if name.startswith(prefix)] == tested
    page = (PACKAGE_PARENT / 'docs/install.md').read_text('utf-8')
    assert re.findall(r'^\| (3\.\d+)\.\d+ \|', page, re.M) == tested


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((PACKAGE_PARENT / 'CITATION.cff').read_text('utf-8'))
    assert citation['version'] == dpmambair_basicsr.__version__
    assert f'\n## [{citation["version"]}] - ' in (PACKAGE_PARENT / 'CHANGELOG.md').read_text('utf-8')


def test_the_root_of_the_package_is_small():
    assert len(list((PACKAGE_PARENT / 'dpmambair_basicsr').glob('*.py'))) <= 14
