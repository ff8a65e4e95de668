"""Check types and circular imports with pyright (see pyproject.toml). The error count of a file may only decrease.

    python scripts/check_types.py [--update]

scripts/type_errors.json records the number of errors per file, and the versions that they were counted with; with other
versions, errors are printed but not compared. Circular imports are never accepted. --update lowers the numbers to the
current ones but never raises them; without the file, e.g. after an upgrade, it writes a new one.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / 'scripts/type_errors.json'
DEPENDS_ON = ('numpy', 'opencv-python', 'pyright', 'torch')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--update', action='store_true', help='lower the known numbers to the current ones')
    update = parser.parse_args().update
    found, versions = find_errors(), {name: version(name) for name in DEPENDS_ON}
    new = {'versions': versions, 'errors': {file: len(lines) for file, lines in found.items()}}
    baseline = json.loads(BASELINE.read_text(encoding='utf-8')) if BASELINE.is_file() else new
    known, comparable = baseline['errors'], baseline['versions'] == versions
    worse = [file for file, lines in found.items() if len(lines) > known.get(file, 0)]
    cycles = [file for file, lines in found.items() if any('reportImportCycles' in line for line in lines)]
    for file in dict.fromkeys(worse + cycles):
        print(f'{file}: {len(found[file])} errors, {known.get(file, 0)} known', *found[file], sep='\n  ')
    print(f'{sum(map(len, found.values()))} type errors, {sum(known.values())} known')
    if not comparable:
        print(f'Not compared: the known errors are for {baseline["versions"]}, installed are {versions}')
    elif update and not worse:
        BASELINE.write_text(json.dumps(new, indent=2, sort_keys=True) + '\n', encoding='utf-8')
    elif new['errors'] != known and not worse:
        print('Fewer than known: python scripts/check_types.py --update')
    return 1 if cycles or (comparable and worse) else 0


def find_errors() -> dict[str, list[str]]:
    """{file: its errors, one line each}."""
    command = [sys.executable, '-m', 'pyright', '--outputjson', '--pythonpath', sys.executable]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found = defaultdict(list)
    for problem in json.loads(result.stdout)['generalDiagnostics']:
        line = problem.get('range', {}).get('start', {}).get('line', 0) + 1
        text = f'{line}: {problem["message"].splitlines()[0]} ({problem.get("rule", "syntax")})'
        found[str(Path(problem['file']).relative_to(ROOT))].append(text)
    return dict(found)


if __name__ == '__main__':
    sys.exit(main())
