"""Checks of an option file before BasicSR reads it: its sections, --force_yml, and the folder of the run."""

import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from basicsr.utils import options as basicsr_options

from dpmambair_basicsr.files.names import name_problem
from dpmambair_basicsr.files.option_files import OptionError, key_lines
from dpmambair_basicsr.files.option_row import TEST, TRAIN
from dpmambair_basicsr.option_checks.schema import OPTIONS
from dpmambair_basicsr.option_checks.values import alternatives, check_value, will_resume
from dpmambair_basicsr.registry import describe, did_you_mean, registered

READ_BY_BASICSR = [row for row in OPTIONS if row.section == '' and row.name not in ('network_g', 'scale')]

MAX_ITERATIONS = 10**12  # BasicSR's estimate of the time left is a timedelta, which ends at 10^9 days
MAX_REPORTED = 50  # problems, and of each
MAX_LENGTH = 600  # characters


def refuse(file: str, problems: list[str], forced: Sequence[str] = ()) -> None:
    """Raises OptionError with all problems of an option file, if any, and the lines of their keys.

    Args:
        forced: the `--force_yml` entries, whose keys have no line.
    """
    if not problems:
        return
    try:
        lines = key_lines(file)
    except OptionError:
        lines = {}
    own = {entry.partition('=')[0].strip().replace(':', '.') for entry in forced}
    count = '1 problem' if len(problems) == 1 else f'{len(problems)} problems'
    told = [with_line(problem, lines, own) for problem in problems[:MAX_REPORTED]]
    told += [f'and {len(problems) - MAX_REPORTED} more'] if len(problems) > MAX_REPORTED else []
    raise OptionError('\n  '.join([f'{file}: {count} in the options:', *told]))


def with_line(problem: str, lines: dict[str, int], forced: set[str]) -> str:
    """The problem, shortened, with the line of its key, or of the section that should have it."""
    key = re.split(r'[:\[]', problem, maxsplit=1)[0]
    key = '' if key in forced else key
    while key and key not in lines:
        key = key.rpartition('.')[0]
    problem = problem if len(problem) <= MAX_LENGTH else f'{problem[:MAX_LENGTH]} ...'
    return f'{problem} (line {lines[key]})' if key else problem


def add_sections(opt, forced: list[str]) -> list[str]:
    """The `--force_yml` entries, preceded by entries that add the known sections missing in the file."""
    opt, entries = deepcopy(opt), []
    for entry in forced:
        *sections, _ = entry.partition('=')[0].strip().split(':')
        paths = [sections[: depth + 1] for depth in range(len(sections))]
        added = [
            f'{":".join(path)}=!!map {{}}' for path in paths if section_at(opt, path) is None and may_be_section(path)
        ]
        apply_forced(opt, [*added, entry])
        entries += [*added, entry]
    return entries


def section_at(opt, path: list[str]):
    for name in path:
        opt = opt.get(name) if isinstance(opt, dict) else None
    return opt


def may_be_section(path: list[str]) -> bool:
    return all(any(fnmatchcase(name, known) for known in sections_in(path[:depth])) for depth, name in enumerate(path))


def sections_in(parent: list[str]) -> list[str]:
    """Names that subsections of this section may have in an option file; * as in `Option`, and for any name."""
    match parent:
        case ['datasets']:
            return ['train', 'val', 'val_*', 'test', 'test_*']
        case ['val', 'metrics'] | ['datasets', _, *_, 'datasets' | 'degradations']:
            return ['*']
        case ['datasets', _] | ['datasets', _, 'datasets', _]:
            section = 'datasets'
        case _:
            section = '.'.join(parent)
    classes = (base for kind in ('MODEL', 'DATASET') for target in registered(kind).values() for base in target.__mro__)
    rows = (*OPTIONS, *(row for base in classes for row in vars(base).get('option_keys', ())))
    return [*dict.fromkeys(row.name for row in rows if row.section == section and dict in alternatives(row.kind))]


def apply_forced(opt, forced: list[str]) -> list[str]:
    """Applies `--force_yml section:key=value` to the file's options as BasicSR will; returns the problems.

    BasicSR runs the keys as Python (utils/options.py:128), so only plain keys are allowed.
    """
    problems = []
    for entry in forced if isinstance(opt, dict) else ():
        where = f'--force_yml {entry if len(entry) <= 100 else entry[:100] + "..."}'
        if not re.fullmatch(r'\s*[\w-]+(:[\w-]+)*\s*=[^=]*', entry):
            problems.append(f'{where}: expected key=value or section:key=value')
            continue
        keys, _, text = entry.partition('=')
        *sections, key = keys.strip().split(':')
        section = opt
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            problems.append(f'{where}: {unknown_section(opt, sections)}')
            continue
        try:
            section[key] = basicsr_options._postprocess_yml_value(text.strip())
        except (ValueError, yaml.YAMLError) as error:
            problems.append(describe(where, error))
    return problems


def unknown_section(opt: dict, path: list[str]) -> str:
    """Problem of a path without a section."""
    depth = next(depth for depth in range(len(path)) if not isinstance(section_at(opt, path[: depth + 1]), dict))
    parent = section_at(opt, path[:depth])
    assert isinstance(parent, dict), 'the path up to `depth` leads to a section'
    choices = {name for name, value in parent.items() if isinstance(value, dict)}
    choices |= {name for name in sections_in(path[:depth]) if '*' not in name}
    return f'there is no section {".".join(path[: depth + 1])}{did_you_mean(path[depth], choices) if choices else ""}'


def check_structure(opt, is_train: bool) -> list[str]:
    """Problems with options that parse_options itself reads, and where it would raise a bare KeyError or TypeError."""
    if not isinstance(opt, dict):
        return ['the file is not a mapping of keys to values']
    if wrong := non_text_keys(opt):
        return [f'{path}: expected text as a key, got {key!r}' for path, key in wrong]
    sections, texts = {}, {}
    if isinstance(opt.get('datasets'), dict):
        sections = {f'datasets.{phase}': dataset for phase, dataset in opt['datasets'].items()}
        if is_train:
            sections.setdefault('datasets.train', None)
        for path, dataset in sections.items():
            if isinstance(dataset, dict):
                texts |= {f'{path}.{key}': dataset.get(key) for key in ('dataroot_gt', 'dataroot_lq')}
    if isinstance(opt.get('path'), dict):
        files = re.compile(r'experiments_root|results_root|.*(resume_state|pretrain_network).*')
        texts |= {f'path.{key}': value for key, value in opt['path'].items() if files.fullmatch(str(key))}
    given = {row: opt.get(row.name) for row in READ_BY_BASICSR}
    required = TRAIN if is_train else TEST
    problems = [f'{row.name}: missing' for row, value in given.items() if value is None and required in row.required]
    for row, value in given.items():
        problems += [] if value is None else check_value(row.name, value, row)
    problems += [f'{path}: missing' for path, section in sections.items() if section is None]
    for path, value in [*texts.items()]:
        if isinstance(value, list) and path.startswith('datasets.'):  # which some datasets take
            texts |= {path: None} | {f'{path}[{index}]': part for index, part in enumerate(value)}
    wrong = {path: section for path, section in sections.items() if not isinstance(section, dict | None)}
    problems += [f'{path}: expected a section, got {value!r}' for path, value in wrong.items()]
    problems += [
        f'{path}: expected text, got {value!r}' for path, value in texts.items() if not isinstance(value, str | None)
    ]
    if is_train and opt.get('val', {}) is None and ('debug' in str(opt.get('name')) or '--debug' in sys.argv):
        problems.append('val: empty, where BasicSR sets val_freq for a debug run; remove the key')
    total = opt['train'].get('total_iter', 1) if isinstance(opt.get('train'), dict) else 1
    if isinstance(total, int | float) and not total <= MAX_ITERATIONS:
        problems.append(f'train.total_iter: must be at most {MAX_ITERATIONS}, got {total!r}')
    return problems + check_names(opt) + check_kinds_of_files(opt)


def check_kinds_of_files(opt: dict) -> list[str]:
    """Checkpoints, states and image lists that exist but would block or never end: a FIFO, /dev/zero."""
    sections = {'path': opt.get('path')}
    if isinstance(opt.get('datasets'), dict):
        sections |= {f'datasets.{phase}': dataset for phase, dataset in opt['datasets'].items()}
    files = {
        f'{path}.{key}': Path(value).expanduser()
        for path, section in sections.items()
        for key, value in (section.items() if isinstance(section, dict) else ())
        if isinstance(value, str) and re.match('resume_state|pretrain_network|meta_info', key)
    }
    wrong = [path for path, file in files.items() if is_endless(file)]
    return [f'{path}: {files[path]} is not a regular file' for path in wrong]


def is_endless(file: Path) -> bool:
    try:
        return file.exists() and not (file.is_file() or file.is_dir())
    except (OSError, ValueError):  # a name that no file can have
        return False


def check_names(opt: dict) -> list[str]:
    """Problems with names that are used for files and folders: a path in one would rename other folders."""
    names = {'name': opt.get('name')}
    for phase, dataset in opt['datasets'].items() if isinstance(opt.get('datasets'), dict) else ():
        if isinstance(dataset, dict):
            names[f'datasets.{phase}.name'] = dataset.get('name')
    if isinstance(opt.get('val'), dict) and opt['val'].get('suffix') not in (None, ''):
        names['val.suffix'] = f'{opt["val"]["suffix"]}_'  # in the middle of a name, which may be a dot
    names |= {key: key for key in opt if key.startswith('network_')}
    found = {key: name_problem(name) for key, name in names.items() if isinstance(name, str)}
    return [f'{key}: {problem}' for key, problem in found.items() if problem]


def non_text_keys(value, path: str = '') -> list[tuple[str, object]]:
    """The path and key of each, in sections and lists of any depth."""
    if isinstance(value, dict):
        found = [(f'{path}{key}', key) for key in value if not isinstance(key, str)]
        return found + [wrong for key, part in value.items() for wrong in non_text_keys(part, f'{path}{key}.')]
    parts = enumerate(value) if isinstance(value, list) else ()
    return [wrong for index, part in parts for wrong in non_text_keys(part, f'{path}{index}.')]


def check_root(opt: dict, wanted: dict) -> list[str]:
    """Problem if `path.experiments_root` or `results_root` of the file, `wanted`, is not a folder of BasicSR's.

    An existing folder is renamed as a whole when a run starts, so it must not hold anything else.
    """
    key, signs = ('results_root', ('visualization', 'test_*.log'))
    if opt['is_train']:
        key, signs = 'experiments_root', ('models', 'training_states', '*.yml')
    folder = Path(opt['path'][key])
    if wanted.get(key) is None or not folder.exists():
        return []
    if not folder.is_dir():
        return [f'path.{key}: {folder} is a file']
    if any(folder.iterdir()) and not any(is_of_a_run(file) for sign in signs for file in folder.glob(sign)):
        return [
            f'path.{key}: {folder} contains files that do not belong to a run, and would be renamed; choose another'
        ]
    return []


def is_of_a_run(file: Path) -> bool:
    """Not any yml file: the copy that BasicSR puts there."""
    return file.suffix != '.yml' or file.read_bytes().startswith(b'# GENERATE TIME')


def check_renamed(opt: dict) -> list[str]:
    """Checkpoints in the folder that BasicSR renames when this training starts, where it would no longer find them."""
    folder = opt['path'].get('experiments_root')
    if not opt['is_train'] or folder is None or will_resume(opt):
        return []
    inside = [
        (key, file)
        for key, file in opt['path'].items()
        if key.startswith('pretrain_network_') and file is not None
        if Path(file).resolve().is_relative_to(Path(folder).resolve()) and Path(file).exists()
    ]
    return [
        f'path.{key}: {file} is in the folder of this run, which is renamed at the start; change the name of the run'
        for key, file in inside
    ]
