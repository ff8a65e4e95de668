"""Add our networks to an existing project, and remove them again without a trace.

    python -m dpmambair_basicsr.dropin PATH [--remove]

PATH is a checkout of BasicSR, a fork with its own basicsr folder, with or (like Restormer's) without a registry, or a
project like HAT with its own package and an installed BasicSR. Existing files are not changed; these are added:
    a file in its archs folder, where it looks for networks, which imports ours;
    basicsr.py beside its train.py, which makes the command use the project's BasicSR, see LAUNCHER;
    our option files in options/, if the project has a registry, in which their models are found.
They are listed with their SHA-256 in .dpmambair_dropin.json beside train.py; `--remove` deletes exactly these.
The project's `train.py --help` is run before and after: if it no longer starts, everything is undone.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import dpmambair_basicsr
from dpmambair_basicsr.files.errors import UserError, exit_on_error
from dpmambair_basicsr.files.option_files import packaged_files

RECORD = '.dpmambair_dropin.json'
OURS = ('dpmambair_arch.py', 'basicsr.py')
HEADER = '"""Written by `python -m dpmambair_basicsr.dropin`; its option --remove deletes it.'
SHIM = f'''\
{HEADER}

The project imports each *_arch.py in this folder. This one brings dpmambair_basicsr, which registers itself.
"""

import warnings

try:
    import dpmambair_basicsr  # noqa: F401
except Exception as error:  # never in the way of the project
    warnings.warn(f'no networks of dpmambair_basicsr: {{type(error).__name__}}: {{error}}', RuntimeWarning)
'''
NAMES = f'''\
{HEADER}

The project imports each *_arch.py in this folder and looks in it for the class that network_g.type names. Ours are here
under their names, unless the project has a class of that name, and as dpmambair_<name>.
"""

import warnings

TAKEN = set(TAKEN_NAMES)
try:
    import dpmambair_basicsr.archs
    from dpmambair_basicsr.registry import ARCH_REGISTRY

    globals().update({{name: net for name, net in ARCH_REGISTRY.by_both_names().items() if name not in TAKEN}})
except Exception as error:  # never in the way of the project
    warnings.warn(f'no networks of dpmambair_basicsr: {{type(error).__name__}}: {{error}}', RuntimeWarning)
'''
LAUNCHER = f'''\
{HEADER}

`python basicsr/train.py` puts this folder first on sys.path, not the one above. `import basicsr` would find an
installed BasicSR, or none; so it would if the project's has no __init__.py. Now it finds this file, which hands over to
the project's own BasicSR, or to the installed one where the project has none.
"""

import sys
import warnings
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from os import path

if __name__ == 'basicsr':
    try:
        import dpmambair_basicsr  # noqa: F401  (makes an older BasicSR importable, and registers itself)
    except Exception as error:  # never in the way of the project
        warnings.warn(f'no dpmambair_basicsr: {{type(error).__name__}}: {{error}}', RuntimeWarning)
    here = path.dirname(path.abspath(__file__))
    others = [entry for entry in sys.path if path.abspath(entry) != here]
    spec = PathFinder.find_spec('basicsr', [path.dirname(here)]) or PathFinder.find_spec('basicsr', others)
    if spec is None:
        raise ModuleNotFoundError("No module named 'basicsr'", name='basicsr')
    sys.modules['basicsr'] = module = module_from_spec(spec)
    if spec.loader is not None:  # a folder without __init__.py has none
        spec.loader.exec_module(module)
'''
# Starts a script as `python SCRIPT --help` does, and prints which of our classes it has, as JSON in the last line.
START = """
import json, os, runpy, sys
script = sys.argv[1]
if not getattr(sys.flags, 'safe_path', False):
    sys.path[0] = os.path.dirname(os.path.abspath(script))
sys.argv = [script, '--help']
try:
    runpy.run_path(script, run_name='__main__')
except SystemExit as end:
    if end.code:
        raise
basicsr, result = sys.modules.get('basicsr'), {'available': {}, 'unavailable': {}}
try:
    if 'dpmambair_basicsr' not in sys.modules:
        raise ImportError('it does not import them')
    import dpmambair_basicsr
    from dpmambair_basicsr.registry import PREFIX, is_ours
    if 'basicsr.utils.registry' in sys.modules:
        result = vars(dpmambair_basicsr.register())
    for name, module in list(sys.modules.items()):
        if name.endswith('models.archs.dpmambair_arch'):
            names = [key for key, value in vars(module).items() if isinstance(value, type) and is_ours(value)]
            second = {PREFIX + key for key in names}
            result['available']['archs'] = [key for key in names if key not in second]
    result['dpmambair_basicsr'] = list(dpmambair_basicsr.__path__)[0]
except Exception as error:
    result['error'] = f'{type(error).__name__}: {error}'
result['basicsr'] = list(basicsr.__path__)[0] if basicsr is not None else ''
print()
print(json.dumps(result))
"""
# The BasicSR imported by a program of the project that is not beside train.py.
FIND = """
import importlib.util
spec = importlib.util.find_spec('basicsr')
print(list(spec.submodule_search_locations)[0] if spec else '')
"""


class ProjectError(UserError, ValueError):
    """Nothing was done; the message names the project and the reason."""


@dataclass(frozen=True)
class Project:
    """A project and its layout.

    Attributes:
        root: its folder.
        package: the folder in it that has train.py: basicsr, or the project's own.
        archs: the folder where it looks for networks.
        has_registry: whether BasicSR, its own or the installed one, finds classes by a registry.
    """

    root: Path
    package: str
    archs: str
    has_registry: bool

    @property
    def script(self) -> str:
        return f'{self.package}/train.py'


def find_project(root: Path) -> Project:
    """Raises ProjectError if `root` is not a supported kind of project."""
    packages = sorted(file.parent.name for file in root.glob('*/train.py'))
    for package in ('basicsr',) if 'basicsr' in packages else packages:
        has_registry = package != 'basicsr' or (root / 'basicsr/utils/registry.py').is_file()
        for archs in (f'{package}/archs', f'{package}/models/archs'):
            if (root / archs / '__init__.py').is_file():
                return Project(root, package, archs, has_registry)
    raise ProjectError(f'{root}: not a supported project: no folder in it has train.py and archs/ or models/archs/')


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m dpmambair_basicsr.dropin', description=(__doc__ or '').partition('\n')[0]
    )
    parser.add_argument('path', type=Path, help='BasicSR checkout, or project with a basicsr folder')
    parser.add_argument('--remove', action='store_true', help='delete the files that were added, and nothing else')
    arguments = parser.parse_args()
    with exit_on_error('', OSError):
        (remove if arguments.remove else install)(arguments.path)


def install(root: Path) -> None:
    """Writes or updates our files in the project `root`.

    Raises:
        ProjectError: if `root` is not such a project, if a file that this command did not write is in the way, if the
            project would no longer start, or if none of our classes would be available. Nothing is left behind then.
    """
    project = find_project(root)
    name_of_record = f'{project.package}/{RECORD}'
    files = files_for(project)
    record = read_record(root)
    refuse_changed(root, record)
    foreign = [
        name for name in (*files, name_of_record) if os.path.lexists(root / name) and name not in record['files']
    ]
    if record['files']:
        foreign.remove(name_of_record)
    if any(name.startswith('options/') for name in files) and os.path.lexists(root / 'options'):
        foreign += [] if (root / 'options').is_dir() else ['options']
    if foreign:
        raise ProjectError(
            f'{root}: nothing written, these files exist and were not written by this command: {", ".join(foreign)}'
        )

    made = sorted({str(Path(name).parent) for name in files if not (root / name).parent.exists()})
    new = {
        'files': {name: sha256(content).hexdigest() for name, content in files.items()},
        'folders': record['folders'] or made,
    }
    delete(root, record)
    before = start(project)
    try:
        # The record first: whatever is truncated can be removed.
        for name, content in {name_of_record: (json.dumps(new, indent=2) + '\n').encode(), **files}.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(content)
        after = start(project)
        refuse_harm(project, before, after)
    except BaseException:
        delete(root, new)
        raise
    for name in (*files, name_of_record):
        print(f'wrote {root / name}')
    report(project, before, after)


def files_for(project: Project) -> dict[str, bytes]:
    """The files to write, {path: content}."""
    shim = SHIM
    if not project.has_registry:
        taken = set()
        for file in (project.root / project.archs).glob('*.py'):
            if file.name not in OURS:
                taken.update(re.findall(r'^class (\w+)', file.read_text(encoding='utf-8', errors='replace'), re.M))
        shim = NAMES.replace('TAKEN_NAMES', repr(sorted(taken)))
    files = {f'{project.archs}/dpmambair_arch.py': shim.encode(), f'{project.package}/basicsr.py': LAUNCHER.encode()}
    if project.has_registry:
        files |= {f'options/{file.name}': file.read_bytes() for file in packaged_files()}
    return files


def start(project: Project) -> dict:
    """Run `python train.py --help`: which of our classes it has, see START; {'stopped': reason} if it fails."""
    command = [sys.executable, '-c', START, project.script]
    environment = os.environ | {'PYTHONDONTWRITEBYTECODE': '1'}
    run = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        return {'stopped': lines[-1] if lines else f'exit status {run.returncode}'}
    return json.loads(run.stdout.splitlines()[-1])


def refuse_harm(project: Project, before: dict, after: dict) -> None:
    """Raise ProjectError if the project no longer starts, or has none of our classes."""
    if 'stopped' in after and 'stopped' in before:
        raise ProjectError(
            f'{project.root}: nothing written, python {project.script} --help does not start here, without our files '
            f'({before["stopped"]}) or with them ({after["stopped"]}){advice()}'
        )
    if 'stopped' in after:
        raise ProjectError(
            f'{project.root}: nothing written, python {project.script} --help would no longer start: {after["stopped"]}'
        )
    if not any(after['available'].values()):
        package = Path(dpmambair_basicsr.__file__).parents[1]
        reason = after.get('error') or json.dumps(after['unavailable'])
        hint = f'. pip install dpmambair_basicsr, or set PYTHONPATH={package}' if 'error' in after else ''
        raise ProjectError(
            f'{project.root}: nothing written, none of our classes would be available to python {project.script}: '
            f'{reason}{hint}{advice()}'
        )


def advice() -> str:
    if os.environ.get('PYTHONSAFEPATH') and sys.version_info >= (3, 11):
        return '. PYTHONSAFEPATH is set: unset it, or basicsr.py beside train.py is not found'
    return ''


def remove(root: Path) -> None:
    """Delete the files that `install` wrote in `root`, and their byte code.

    Raises:
        ProjectError: if one of these files has changed since. Nothing is deleted then.
    """
    record = read_record(root)
    if not record['files']:
        raise ProjectError(f'{root}: nothing to remove, there is no {RECORD} in its folders')
    refuse_changed(root, record)
    delete(root, record)
    for name in record['files']:
        print(f'deleted {root / name}')
    for name in record['folders']:
        if (root / name).is_dir():
            print(f'kept {root / name}: it contains other files')


def read_record(root: Path) -> dict:
    """{'files': {path: SHA-256}, 'folders': [created ones]}, empty if nothing was installed."""
    for file in root.glob(f'*/{RECORD}'):
        try:
            record = json.loads(file.read_text())
        except ValueError:
            raise ProjectError(f'{file}: damaged; delete it, and the files that this command wrote, yourself') from None
        for name in (*record['files'], *record['folders']):
            if Path(name).is_absolute() or '..' in Path(name).parts:  # part of the project, not written by us
                raise ProjectError(f'{file}: names {name}, which is outside the project')
        return record
    return {'files': {}, 'folders': []}


def refuse_changed(root: Path, record: dict) -> None:
    files = {name: root / name for name in record['files']}
    present = {name: file for name, file in files.items() if os.path.lexists(file)}
    changed = [
        name
        for name, file in present.items()
        if not file.is_file() or sha256(file.read_bytes()).hexdigest() != record['files'][name]
    ]
    if changed:
        names = ', '.join(changed)
        raise ProjectError(
            f'{root}: nothing done, these files were changed since they were written, move them away first: {names}'
        )


def delete(root: Path, record: dict) -> None:
    """Delete the files of `record`, their byte code, the created folders if they are empty, and the record."""
    for file in (root / name for name in record['files']):
        file.unlink(missing_ok=True)
        cache = file.parent / '__pycache__'
        for compiled in cache.glob(f'{file.stem}.*.pyc') if file.suffix == '.py' else ():
            compiled.unlink()
        remove_if_empty(cache)
    for name in record['folders']:
        remove_if_empty(root / name)
    for file in root.glob(f'*/{RECORD}'):
        file.unlink()


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def report(project: Project, before: dict, after: dict) -> None:
    """Print which of our classes the command has, which BasicSR it uses, and earlier problems."""
    print(f'In {project.root}, python {project.script} uses')
    print(f'  {after["basicsr"] or "no basicsr"}')
    print(f'  {after["dpmambair_basicsr"]}')
    if 'stopped' in before:
        print(f'  It did not start before: {before["stopped"]}')
    for kind, names in after['available'].items():
        if names:
            print(f'{kind}: {", ".join(names)}')
    for kind, reasons in after['unavailable'].items():
        for name, reason in reasons.items():
            print(f'not available: {kind} {name}: {reason}')
    own = project.root / 'basicsr'
    if own.is_dir() and not (own / '__init__.py').exists():
        elsewhere = subprocess.run([sys.executable, '-c', FIND], cwd=project.root, capture_output=True, text=True)
        if (found := elsewhere.stdout.strip()) and Path(found).resolve() != own.resolve():
            print(
                f'WARNING: {own} has no __init__.py, so all other programs of the project import the basicsr in '
                f'{found}; use an environment without that one (pip uninstall basicsr), see docs/projects.md'
            )


if __name__ == '__main__':
    main()
