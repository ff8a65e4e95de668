"""Checks an option file against the code that will read it, before anything is created.

`patches/options` calls this when BasicSR parses its options. What takes no time and no memory is made on trial: our
networks (without storage), our datasets, optimizers, schedulers. A file for one of BasicSR's own models gets only the
checks that no working file fails; the others need to know which keys are read: those of `schema.OPTIONS`, and those
that our classes declare, as rows of the same shape, in `option_keys`.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from fnmatch import translate
from pathlib import Path

import torch

from dpmambair_basicsr.files.option_row import TEST, TRAIN, Option, names
from dpmambair_basicsr.ops.selective_scan.backend import BackendError, check_backend
from dpmambair_basicsr.option_checks.calls import CALLS, check_call, check_metric, unknown_keys
from dpmambair_basicsr.option_checks.dry_run import check_on_trial
from dpmambair_basicsr.option_checks.schema import (
    FILES,
    OPTIONS,
    REFUSED_LATER,
    SCAN_BACKEND,
    SET_BY_BASICSR,
    rows_of,
)
from dpmambair_basicsr.option_checks.structure import check_renamed
from dpmambair_basicsr.option_checks.values import alternatives, check_numbers, check_value, will_resume
from dpmambair_basicsr.registry import look_up, registered

SECTIONS = ('', 'train', 'val', 'path', 'logger', 'logger.wandb', 'dist_params')
LOADER = tuple(row for row in OPTIONS if row.section == 'datasets')


def check_options(opt: dict) -> list[str]:
    """Problems of the options that parse_options returns, each 'section.key: what is wrong'; `opt` stays as it is."""
    opt = deepcopy(opt)
    model, problems = look_up(registered('MODEL'), 'model_type', opt['model_type'])
    if hasattr(model, 'option_keys'):
        problems = check_keys(opt, model)
    problems = [*dict.fromkeys(check_loaders(opt) + check_scan_backend(opt) + problems)]
    return problems + check_on_trial(opt, model, problems)


def check_keys(opt: dict, model: type) -> list[str]:
    """Unknown and missing keys, unknown types, values of the wrong kind, files that do not exist."""
    rows = rows_of(model)
    problems = check_sections(opt, rows) + check_calls(opt, rows)
    for phase, dataset in opt['datasets'].items():
        problems += check_dataset(f'datasets.{phase}', dataset)
    files = ('resume_state',) if will_resume(opt) else ('resume_state', 'pretrain_network')
    problems += check_renamed(opt) + check_files('path', opt['path'], files)
    return problems + check_numbers('', opt, text_keys(rows))


def check_loaders(opt: dict) -> list[str]:
    """What ends any model's run after folders were renamed, or later: devices and loaders that do not work so."""
    problems, cuda = [], torch.cuda.is_available()
    prefetch_mode = next(row for row in LOADER if row.name == 'prefetch_mode')
    if not cuda and opt['num_gpu'] != 0:
        problems.append(f'num_gpu: {opt["num_gpu"]}, but PyTorch finds no CUDA device; write 0 or auto')
    for phase, dataset in opt['datasets'].items():
        path, mode = f'datasets.{phase}', dataset.get('prefetch_mode')
        kinds = ('val',) if opt['is_train'] else ('test', 'val')
        if phase != 'train' and phase.split('_')[0] not in kinds:
            problems.append(f'{path}: unknown data set; choices: train, {", ".join(kinds)}, {kinds[-1]}_<name>')
        problems += check_value(f'{path}.prefetch_mode', mode, prefetch_mode)
        if mode == 'cuda' and not cuda:
            problems.append(f'{path}.prefetch_mode: cuda, but PyTorch finds no CUDA device; write ~')
        elif mode == 'cuda' and phase == 'train' and dataset.get('pin_memory') is not True:
            problems.append(f'{path}.pin_memory: prefetch_mode cuda needs true')
        if dataset.get('persistent_workers'):
            if mode == 'cpu':  # its threads share the workers' one iterator
                problems.append(
                    f'{path}.persistent_workers: crashes at random with prefetch_mode cpu; write false or ~'
                )
            elif phase != 'train' or dataset.get('num_worker_per_gpu') == 0:
                problems.append(f'{path}.persistent_workers: true, but this loader has no workers; write false')
    return problems


def check_scan_backend(opt: dict) -> list[str]:
    """Problem if the backend of selective scans that is asked for, here or by the environment, cannot run."""
    name = opt.get('scan_backend')
    if problems := check_value('scan_backend', name, SCAN_BACKEND):
        return problems
    try:
        check_backend(name, 'scan_backend', torch.device('cuda' if opt['num_gpu'] else 'cpu'))
    except BackendError as error:
        return [str(error)]
    return []


def section_of(opt: dict, path: str):
    """The section at a path such as 'logger.wandb'; None if there is none."""
    for name in filter(None, path.split('.')):
        opt = opt.get(name) if isinstance(opt, dict) else None
    return opt


def keys_of(row: Option, opt: dict) -> list[str]:
    """The keys that a row stands for in this file: its * is the letter of a network, or the name of a loss."""
    if row.name == '*_opt':
        return [key for key in opt.get('train') or () if key.endswith('_opt')]
    networks = {'network_g': None} | {key: None for key in opt if key.startswith('network_')}
    return [row.name.replace('*', network.removeprefix('network_')) for network in networks]


def check_sections(opt: dict, rows: Iterable[Option]) -> list[str]:
    """Keys of the general sections that nobody reads, missing ones, and values of the wrong kind."""
    problems = []
    for section in SECTIONS:
        given, prefix = section_of(opt, section), section and f'{section}.'
        known = {key: row for row in rows if row.section == section for key in keys_of(row, opt)}
        if isinstance(given, dict):
            problems += check_rows(prefix, given, known, TRAIN if opt['is_train'] else TEST)
            problems += unknown_keys(prefix, given, {*known} | SET_BY_BASICSR.get(section, set()))
    if not opt['is_train'] and opt['val'].get('save_img') and 'suffix' not in opt['val']:
        problems.append('val.suffix: missing; write ~ to name the images after the experiment')
    return problems


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
                problems.append(f'{path}: has to be a section, not {section[key]!r}')
            else:
                for name, part in section[key].items():
                    problems += check_metric(f'{path}.{name}', part)
    return problems


def check_dataset(path: str, opt: dict) -> list[str]:
    dataset, problems = look_up(registered('DATASET'), f'{path}.type', opt.get('type'))
    declared = getattr(dataset, 'option_keys', ())
    known = {row.name: row for row in (*LOADER, *declared) if row.name != 'type'}
    problems += check_rows(f'{path}.', opt, known, opt['phase'])
    if declared:
        problems += unknown_keys(f'{path}.', opt, {*known, 'type'} | SET_BY_BASICSR['datasets'] | REFUSED_LATER)
    parts = opt.get('datasets')  # of a mixed dataset
    parts = parts if isinstance(parts, dict) else {}
    for name, part in {path: opt, **{f'{path}.datasets.{name}': part for name, part in parts.items()}}.items():
        backend = part.get('io_backend') if isinstance(part, dict) else None
        if not isinstance(part, dict | None):
            problems.append(f'{name}: has to be a section, not {part!r}')
        elif wrong := check_value(f'{name}.io_backend', backend, known['io_backend']):
            problems += wrong
        elif backend and 'type' not in backend:
            problems.append(f'{name}.io_backend.type: missing')
        elif part and (backend or {'type': 'disk'})['type'] in ('disk', 'lmdb'):
            problems += check_files(name, part, FILES)
    return problems


def check_files(path: str, opt: dict, prefixes: tuple[str, ...]) -> list[str]:
    """Files and folders that are named but do not exist."""
    named = {key: value for key, value in opt.items() if key.startswith(prefixes) and value is not None}
    pairs = [(key, name) for key, value in named.items() for name in (value if isinstance(value, list) else [value])]
    return [f'{path}.{key}: {name} does not exist' for key, name in pairs if not Path(str(name)).expanduser().exists()]


def text_keys(rows: Iterable[Option]) -> re.Pattern:
    """Keys, in any section, whose value is text although it may look like a number."""
    of_datasets = (row for target in registered('DATASET').values() for row in getattr(target, 'option_keys', ()))
    found = names(row for row in (*rows, *of_datasets) if str in alternatives(row.kind))
    return re.compile('|'.join(map(translate, sorted({*found, *(f'{prefix}*' for prefix in FILES)}))))
