"""Checks an option file against the code that will read it, before anything is created.

`patches/options` calls this when BasicSR parses its options. Whatever is cheap is built in a dry run: our networks (on
the meta device), our datasets, optimizers, schedulers. A file for one of BasicSR's own models gets only the checks that
no working file fails; the other checks require knowing which keys are read: those of `schema.OPTIONS`, and those that
our classes declare in `option_keys`.
"""

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from fnmatch import translate
from pathlib import Path

from basicsr.models.sr_model import SRModel

from dpmambair_basicsr.files.option_row import TEST, TRAIN, Option, names
from dpmambair_basicsr.option_checks.calls import CALLS, check_call, check_metric, compares, unknown_keys
from dpmambair_basicsr.option_checks.dry_run import check_by_dry_run
from dpmambair_basicsr.option_checks.host import check_overwritten, check_start, check_unique_names
from dpmambair_basicsr.option_checks.migration import find
from dpmambair_basicsr.option_checks.schema import (
    FILES,
    OPTIONS,
    REFUSED_LATER,
    SET_BY_BASICSR,
    rows_of,
)
from dpmambair_basicsr.option_checks.structure import check_renamed
from dpmambair_basicsr.option_checks.values import alternatives, check_numbers, check_value, will_resume
from dpmambair_basicsr.registry import is_ours, look_up, registered

SECTIONS = ('', 'train', 'val', 'path', 'logger', 'logger.wandb', 'dist_params')
SAME_IN_LOG = {'pix_opt': 'pixel_opt', 'percep_opt': 'perceptual_opt'}  # the log abbreviates the second
LOADER = tuple(row for row in OPTIONS if row.section == 'datasets')


def check_options(opt: dict, raw: dict | None = None) -> list[str]:
    """Problems of the options that parse_options returns, each 'section.key: what is wrong'. `opt` is not modified.

    Args:
        raw: the options as in the file; BasicSR may have replaced some.
    """
    opt = deepcopy(opt)
    model, problems = find(registered('MODEL'), 'model_type', opt['model_type'])
    if model is None:
        problems += check_parts(opt, OPTIONS)
    elif hasattr(model, 'option_keys'):
        problems += check_sections(opt, model) + check_parts(opt, rows_of(model)) + check_unique_names(opt)
        problems += check_overwritten(raw or opt, opt)
    elif model.__init__ is SRModel.__init__:
        problems += check_start_of_sr_model(opt)
    problems = [*dict.fromkeys(check_start(opt) + problems)]
    return problems + check_by_dry_run(opt, model, problems)


def check_parts(opt: dict, rows: Iterable[Option]) -> list[str]:
    """Checks independent of the model: unknown types, their arguments, missing files, numbers as text."""
    problems = check_calls(opt, rows)
    for phase, dataset in opt['datasets'].items():
        problems += check_dataset(f'datasets.{phase}', dataset)
    files = ('resume_state',) if will_resume(opt) else ('resume_state', 'pretrain_network')
    problems += check_renamed(opt) + check_files('path', opt['path'], files)
    return problems + check_numbers('', opt, text_keys(rows))


def check_start_of_sr_model(opt: dict) -> list[str]:
    """What the constructor of SRModel (and of subclasses that inherit it) would not find."""
    network = opt.get('network_g')
    _, problems = look_up(registered('ARCH'), 'network_g.type', network.get('type')) if network else (None, [])
    return problems + ([] if will_resume(opt) else check_files('path', opt['path'], ('pretrain_network_g',)))


def section_of(opt: dict, path: str):
    """The section at a path such as 'logger.wandb'; None if there is none."""
    section = opt
    for name in filter(None, path.split('.')):
        section = section.get(name) if isinstance(section, dict) else None
    return section


def keys_of(row: Option, opt: dict) -> list[str]:
    """The keys that a row matches in this file: * is the letter of a network, or the name of a loss."""
    if row.name == '*_opt':
        return [key for key in opt.get('train') or () if key.endswith('_opt')]
    networks = {'network_g': None} | {key: None for key in opt if key.startswith('network_')}
    return [row.name.replace('*', network.removeprefix('network_')) for network in networks]


def check_sections(opt: dict, model: type) -> list[str]:
    """Unknown and missing keys of the general sections, and values of the wrong type."""
    problems, rows = [], rows_of(model)
    of_datasets = (row for target in registered('DATASET').values() for row in getattr(target, 'option_keys', ()))
    elsewhere = {row.name: row.section or 'the top of the file' for row in (*of_datasets, *rows)}
    for section in SECTIONS:
        given, prefix = section_of(opt, section), section and f'{section}.'
        known = {key: row for row in rows if row.section == section for key in keys_of(row, opt)}
        if isinstance(given, dict):
            problems += check_rows(prefix, given, known, TRAIN if opt['is_train'] else TEST)
            unread = {key for key in given if section == '' and key.startswith('network_') and key not in known}
            problems += [f'{key}: {model.__name__} has no such network; leave it out' for key in sorted(unread)]
            problems += unknown_keys(prefix, given, {*known} | unread | SET_BY_BASICSR.get(section, set()), elsewhere)
    if not opt['is_train'] and opt['val'].get('save_img') and 'suffix' not in opt['val']:
        problems.append('val.suffix: missing; write ~ to name the images after the experiment')
    if not opt['is_train'] and 'train' in opt['datasets']:
        problems.append('datasets.train: BasicSR would test random crops of it; name it test')
    problems += check_truth(opt, model)
    losses = {key for key, loss in (section_of(opt, 'train') or {}).items() if loss is not None}
    problems += [
        f'train.{key}: logged as l_{key.removesuffix("_opt")}, as train.{other} is; rename it'
        for key, other in SAME_IN_LOG.items()
        if {key, other} <= losses and not hasattr(model, 'loss_keys')  # else it has but these losses
    ]
    ignored = opt['path'].get('ignore_resume_networks') or ()
    problems += [
        f'path.ignore_resume_networks: the file has no {name}'
        for name in ([ignored] if isinstance(ignored, str) else ignored)
        if str(name) not in opt
    ]
    return problems


def check_truth(opt: dict, model: type) -> list[str]:
    """Metrics that need ground truth, and a model that learns degradations from it, on a dataset without it."""
    metrics, known = (opt.get('val') or {}).get('metrics') or {}, registered('METRIC')
    without = [phase for phase, dataset in opt['datasets'].items() if dataset.get('type') == 'SingleImageDataset']
    if getattr(model, 'learns_degradations', False):
        needs = f'{model.__name__} degrades clean images'
        return [f'datasets.{phase}: {needs}, and SingleImageDataset has none' for phase in without]
    compared = [
        name
        for name, metric in (metrics if isinstance(metrics, dict) else {}).items()
        if isinstance(metric, dict) and str(metric.get('type')) in known and compares(metric)
    ]
    return [
        f'val.metrics.{name}: compares with clean images, and datasets.{phase} (SingleImageDataset) has none'
        for phase in without
        for name in compared
    ]


def check_rows(prefix: str, given: dict, known: dict[str, Option], phase: str) -> list[str]:
    problems = [f'{prefix}{key}: missing' for key, row in known.items() if phase in row.required and key not in given]
    for key, row in known.items():
        if key in given and not row.calls:
            problems += check_value(f'{prefix}{key}', given[key], row)
    return problems


def check_calls(opt: dict, rows: Iterable[Option]) -> list[str]:
    """The sections with a `type`."""
    problems = []
    for row in (row for row in rows if row.calls):
        section = section_of(opt, row.section) or {}
        for key in keys_of(row, opt):
            path = f'{row.section}.{key}'.lstrip('.')
            if key not in section or (section[key] is None and type(None) in alternatives(row.kind)):
                continue
            elif row.calls != 'METRIC':
                problems += check_call(path, section[key], CALLS[row.calls])
            elif not isinstance(section[key], dict):
                problems.append(f'{path}: expected a section, got {section[key]!r}')
            else:
                for name, part in section[key].items():
                    problems += check_metric(f'{path}.{name}', part, opt['is_train'])
    return problems


def check_dataset(path: str, opt: dict) -> list[str]:
    dataset, problems = find(registered('DATASET'), f'{path}.type', opt.get('type'))
    declared = getattr(dataset, 'option_keys', ())
    known = {row.name: row for row in (*LOADER, *declared) if row.name != 'type'}
    problems += check_rows(f'{path}.', opt, known, opt['phase'])
    if declared:
        problems += unknown_keys(f'{path}.', opt, {*known, 'type'} | SET_BY_BASICSR['datasets'] | REFUSED_LATER)
    elif dataset is not None and dataset.__module__.startswith('basicsr.data.'):
        problems += check_ignored_keys(path, opt)
    parts = opt.get('datasets')  # of a mixed dataset
    parts = parts if isinstance(parts, dict) else {}
    for name, part in {path: opt, **{f'{path}.datasets.{name}': part for name, part in parts.items()}}.items():
        backend = part.get('io_backend') if isinstance(part, dict) else None
        if not isinstance(part, dict | None):
            problems.append(f'{name}: expected a section, got {part!r}')
        elif wrong := check_value(f'{name}.io_backend', backend, known['io_backend']):
            problems += wrong
        elif backend and 'type' not in backend:
            problems.append(f'{name}.io_backend.type: missing')
        elif part and (backend or {'type': 'disk'})['type'] in ('disk', 'lmdb'):
            problems += check_files(name, part, FILES)
    return problems


def check_ignored_keys(path: str, opt: dict) -> list[str]:
    """Keys, in a set of one of BasicSR's types, that only our datasets read: none in the modules of `basicsr.data`."""
    known, readers = registered('DATASET'), defaultdict(list)
    for target in dict.fromkeys(target for target in known.values() if is_ours(target)):
        for row in target.option_keys:
            readers[row.name].append(target.__name__)
    modules = {target.__module__ for target in known.values() if target.__module__.startswith('basicsr.data.')}
    source = '\n'.join(inspect.getsource(sys.modules[name]) for name in modules)
    ignored = [key for key in opt if key in readers and opt[key] and not re.search(rf'[\'"]{key}[\'"]', source)]
    return [f'{path}.{key}: {opt["type"]} ignores it; it is for {" or ".join(readers[key])}' for key in ignored]


def check_files(path: str, opt: dict, prefixes: tuple[str, ...]) -> list[str]:
    """Files and folders that are named but do not exist."""
    named = {key: value for key, value in opt.items() if key.startswith(prefixes) and value is not None}
    pairs = [(key, name) for key, value in named.items() for name in (value if isinstance(value, list) else [value])]
    return [f'{path}.{key}: {name} does not exist' for key, name in pairs if not Path(str(name)).expanduser().exists()]


def text_keys(rows: Iterable[Option]) -> re.Pattern:
    """Keys, in any section, whose value is text even if it looks like a number."""
    of_datasets = (row for target in registered('DATASET').values() for row in getattr(target, 'option_keys', ()))
    found = names(row for row in (*rows, *of_datasets) if str in alternatives(row.kind))
    return re.compile('|'.join(map(translate, sorted({*found, *(f'{prefix}*' for prefix in FILES)}))))
