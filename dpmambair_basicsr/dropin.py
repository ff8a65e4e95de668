"""Makes `python basicsr/train.py -opt options/train_dpmambair.yml` work in a BasicSR checkout, and undoes it.

    python -m dpmambair_basicsr.dropin PATH [--remove]

PATH is a checkout of BasicSR or a project with BasicSR inside (basicsr/ with a registry). No file of it is changed;
three kinds are added: a file in basicsr/archs that BasicSR imports by itself and that imports us, a file
basicsr/basicsr.py that makes the command use the checkout's BasicSR (see LAUNCHER), and our option files in options/.
They are listed with their SHA-256 in basicsr/.dpmambair_dropin.json; `--remove` deletes these and nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import dpmambair_basicsr

RECORD = 'basicsr/.dpmambair_dropin.json'
NEEDED = ('basicsr/utils/registry.py', 'basicsr/train.py', 'basicsr/archs/__init__.py', 'basicsr/__init__.py')
SHIM = '''\
"""Written by `python -m dpmambair_basicsr.dropin`; its option --remove deletes it.

BasicSR imports each *_arch.py in this folder. This one brings dpmambair_basicsr, which registers itself.
"""

import dpmambair_basicsr  # noqa: F401  (not found: pip install it into this Python, or delete this file)
'''
LAUNCHER = '''\
"""Written by `python -m dpmambair_basicsr.dropin`; its option --remove deletes it.

`python basicsr/train.py` puts this folder first on sys.path, not the checkout. `import basicsr` would find an installed
BasicSR, or none; now it finds this file, which puts the checkout in the folder's place and hands over to its BasicSR.
"""

import importlib
import sys
from os import path

if __name__ == 'basicsr':
    here = path.dirname(path.abspath(__file__))
    sys.path[:] = [path.dirname(here) if path.abspath(entry) == here else entry for entry in sys.path]
    import dpmambair_basicsr  # not found: pip install it into this Python, or delete this file

    del sys.modules['basicsr']
    importlib.import_module('basicsr')
    dpmambair_basicsr.register()
'''
# Run without this folder: what a new Python finds by itself and in PYTHONPATH.
FIND = """
import sys, importlib.util
if not getattr(sys.flags, 'safe_path', False):
    sys.path.pop(0)
for name in ('dpmambair_basicsr', 'basicsr'):
    spec = importlib.util.find_spec(name)
    print(spec.origin or '' if spec else '')
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m dpmambair_basicsr.dropin', description=__doc__.splitlines()[0])
    parser.add_argument('path', type=Path, help='BasicSR checkout, or project with a basicsr folder')
    parser.add_argument('--remove', action='store_true', help='delete what was written there, and nothing else')
    arguments = parser.parse_args()
    (remove if arguments.remove else install)(arguments.path)


def install(root: Path) -> None:
    """Writes or updates our files in the checkout `root`.

    Raises:
        SystemExit: if `root` is no such checkout, or a file is in the way that this command did not write. Nothing has
            been written then.
    """
    for name in NEEDED:
        if not (root / name).is_file():
            raise SystemExit(f'{root}: not a BasicSR checkout with a registry: {name} is missing')
    files = {'basicsr/archs/dpmambair_arch.py': SHIM.encode(), 'basicsr/basicsr.py': LAUNCHER.encode()}
    shipped = [*sorted(option_files().glob('*.yml')), option_files() / 'dpmambair.schema.json']  # which editors read
    files |= {f'options/{file.name}': file.read_bytes() for file in shipped}
    record = read_record(root)
    refuse_changed(root, record)
    foreign = [name for name in (*files, RECORD) if os.path.lexists(root / name) and name not in record['files']]
    if record['files']:
        foreign.remove(RECORD)
    if os.path.lexists(root / 'options') and not (root / 'options').is_dir():
        foreign.append('options')
    if foreign:
        raise SystemExit(f'{root}: nothing written, these exist and are not from this command: {", ".join(foreign)}')

    folders = record['folders'] or ([] if (root / 'options').exists() else ['options'])
    delete(root, record)
    new = {'files': {name: sha256(content).hexdigest() for name, content in files.items()}, 'folders': folders}
    (root / RECORD).write_text(json.dumps(new, indent=2) + '\n')  # first: whatever is cut short can be removed
    (root / 'options').mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name).write_bytes(content)
        print(f'wrote {root / name}')
    print(f'wrote {root / RECORD}')
    report(root)


def remove(root: Path) -> None:
    """Deletes what `install` wrote in `root`, and the byte code of it.

    Raises:
        SystemExit: if one of these files was changed since. Nothing has been deleted then.
    """
    record = read_record(root)
    if not record['files']:
        raise SystemExit(f'{root}: nothing to remove, there is no {RECORD}')
    refuse_changed(root, record)
    delete(root, record)
    for name in record['files']:
        print(f'deleted {root / name}')
    for name in record['folders']:
        if (root / name).is_dir():
            print(f'kept {root / name}: it holds other files')


def option_files() -> Path:
    """Where our option files are: in the package if it was installed from a wheel, beside it in a source checkout."""
    package = Path(dpmambair_basicsr.__file__).parent
    in_wheel = package / 'option_files'
    return in_wheel if in_wheel.is_dir() else package.parent / 'options'


def read_record(root: Path) -> dict:
    """{'files': {path: SHA-256}, 'folders': [those that were made]}, empty if nothing of ours is there."""
    file = root / RECORD
    record = json.loads(file.read_text()) if file.is_file() else {'files': {}, 'folders': []}
    for name in (*record['files'], *record['folders']):
        if Path(name).is_absolute() or '..' in Path(name).parts:  # came with the checkout, not from us
            raise SystemExit(f'{file}: names {name}, which is outside the checkout')
    return record


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
        raise SystemExit(
            f'{root}: nothing done, move these away first, they were changed since they were written: {names}'
        )


def delete(root: Path, record: dict) -> None:
    """Deletes the files of `record`, their byte code, the folders that were made if they are empty, and the record."""
    for file in (root / name for name in record['files']):
        file.unlink(missing_ok=True)
        cache = file.parent / '__pycache__'
        for compiled in cache.glob(f'{file.stem}.*.pyc') if file.suffix == '.py' else ():
            compiled.unlink()
        remove_if_empty(cache)
    for name in record['folders']:
        remove_if_empty(root / name)
    (root / RECORD).unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def report(root: Path) -> None:
    """Says which BasicSR the command will load, and whether it will find us."""
    command = [sys.executable, '-c', FIND]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    ours, installed = found.splitlines()[-2:]
    print(f'In {root}, python basicsr/train.py will use')
    otherwise = str(Path(installed).parent) if installed else 'no BasicSR'
    if os.environ.get('PYTHONSAFEPATH') and sys.version_info >= (3, 11):
        print(f'  {otherwise}, because PYTHONSAFEPATH is set: unset it, or basicsr/basicsr.py is not found')
    else:
        print(f'  {root.resolve() / "basicsr"} (without basicsr/basicsr.py: {otherwise})')
    if ours:
        print(f'  {Path(ours).parent}')
    else:
        package = Path(dpmambair_basicsr.__file__).parents[1]
        print(f'  no dpmambair_basicsr: {sys.executable} does not find it. pip install it, or set PYTHONPATH={package}')


if __name__ == '__main__':
    main()
