"""Checks an option file against the code that will read it, before anything is created.

`patches/options` calls this when BasicSR parses its options. What takes no time and no memory is made on trial: our
networks (without storage), our data sets, optimisers, schedulers. A file for one of BasicSR's own models gets only the
checks that no working file fails; the others need to know which keys are read, which our classes declare:
    a model class: `option_keys = {'train': frozenset({...}), 'val': ..., 'path': ..., 'logger': ..., 'top': ...}`,
    what it reads beside KNOWN; those of its base classes are added;
    a data set class: `option_keys = frozenset({...})`, what it reads beside LOADER.
"""

import inspect
import math
from copy import deepcopy
from pathlib import Path

import torch

from dpmambair_basicsr.losses import vgg_perceptual_loss
from dpmambair_basicsr.losses.lpips_network import BACKBONES, backbone_path
from dpmambair_basicsr.option_checks.dry_run import check_on_trial
from dpmambair_basicsr.option_checks.schema import (
    KNOWN,
    LIMITS,
    LOADER,
    LOADER_LIMITS,
    MAY_BE_EMPTY,
    REQUIRED,
    TEXT_KEYS,
)
from dpmambair_basicsr.option_checks.structure import check_renamed
from dpmambair_basicsr.option_checks.values import KINDS, is_kind, is_number_as_text, kind_in_words, will_resume
from dpmambair_basicsr.registry import (
    arguments_of,
    describe,
    did_you_mean,
    is_ours,
    look_up,
    optimizers,
    registered,
    schedulers,
)


def check_options(opt: dict) -> list[str]:
    """Problems of the options that parse_options returns, each 'section.key: what is wrong'; `opt` stays as it is."""
    opt = deepcopy(opt)
    model, problems = look_up(registered('MODEL'), 'model_type', opt['model_type'])
    if hasattr(model, 'option_keys'):
        problems = check_keys(opt, model)
    problems = check_loaders(opt) + problems
    return problems + check_on_trial(opt, model, problems)


def check_keys(opt: dict, model: type) -> list[str]:
    """Unknown and missing keys, unknown types, values of the wrong kind, files that do not exist."""
    networks = [key for key in opt if str(key).startswith('network_')]
    problems = check_sections(opt, model, networks)
    for network in networks:
        problems += check_call(registered('ARCH'), network, opt[network])
    for phase, dataset in opt['datasets'].items():
        problems += check_dataset(f'datasets.{phase}', dataset)
    for key, value in (opt.get('train') or {}).items():
        if key.endswith('_opt') and value is not None:
            problems += check_call(registered('LOSS'), f'train.{key}', value)
        elif key.startswith('optim_'):
            problems += check_call(optimizers(), f'train.{key}', value, given=('params',), required=('lr',))
        elif key.startswith('scheduler') and value is not None:
            problems += check_call(schedulers(), f'train.{key}', value, given=('optimizer',))
    metrics = (opt.get('val') or {}).get('metrics') or {}
    if not isinstance(metrics, dict):
        problems.append(f'val.metrics: has to be a section, not {metrics!r}')
        metrics = {}
    for name, metric in metrics.items():
        problems += check_metric(f'val.metrics.{name}', metric)
    problems += check_renamed(opt)
    files = ('resume_state',) if will_resume(opt) else ('resume_state', 'pretrain_network')
    problems += check_limits('', opt, {key: limits for key, limits in LIMITS.items() if '.' not in key})
    for section in ('train', 'val', 'logger'):
        limits = {key.partition('.')[2]: value for key, value in LIMITS.items() if key.startswith(f'{section}.')}
        problems += check_limits(f'{section}.', opt.get(section) or {}, limits)
    return problems + check_files('path', opt['path'], files) + check_numbers('', opt)


def check_loaders(opt: dict) -> list[str]:
    """What ends any model's run after folders were renamed, or later: devices and loaders that do not work so."""
    problems, cuda = [], torch.cuda.is_available()
    if not cuda and opt['num_gpu'] != 0:
        problems.append(f'num_gpu: {opt["num_gpu"]}, but PyTorch finds no CUDA device; write 0 or auto')
    for phase, dataset in opt['datasets'].items():
        path, mode = f'datasets.{phase}', dataset.get('prefetch_mode')
        kinds = ('val',) if opt['is_train'] else ('test', 'val')
        if dataset['phase'] not in kinds and not (opt['is_train'] and phase == 'train'):
            choices = ['train'] * opt['is_train'] + [name for kind in kinds for name in (kind, f'{kind}_<name>')]
            problems.append(f'{path}: unknown data set; choices: {", ".join(choices)}')
        if mode not in (None, 'cpu', 'cuda'):
            problems.append(f'{path}.prefetch_mode: {mode!r} is none of cpu, cuda, ~')
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


def check_sections(opt: dict, model: type, networks: list[str]) -> list[str]:
    """Keys of the general sections that nobody reads, and missing ones that BasicSR reads without a default."""
    declared = [vars(base).get('option_keys', {}) for base in model.__mro__]
    losses = [key for key in opt.get('train') or () if key.endswith('_opt')]
    of_networks = [
        f'{kind}_{network.removeprefix("network_")}'
        for kind in ('pretrain_network', 'strict_load', 'param_key')
        for network in ('network_g', *networks)
    ]
    also = {'top': networks, 'train': losses, 'path': of_networks}
    problems = [] if 'network_g' in networks else ['network_g: missing']
    for section, keys in KNOWN.items():
        known = {*keys.split(), *also.get(section, ()), *(key for own in declared for key in own.get(section, ()))}
        given = opt if section == 'top' else opt.get(section) or {}
        problems += unknown_keys('' if section == 'top' else f'{section}.', given, known)
    for section, keys in REQUIRED[opt['is_train']].items():
        if opt.get(section) is not None:
            problems += [f'{section}.{key}: missing' for key in keys.split() if key not in opt[section]]
    if not opt['is_train'] and opt['val'].get('save_img') and 'suffix' not in opt['val']:
        problems.append('val.suffix: missing; write ~ to name the images after the experiment')
    return problems


def check_dataset(path: str, opt: dict) -> list[str]:
    dataset, problems = look_up(registered('DATASET'), f'{path}.type', opt.get('type'))
    required = ('name', 'batch_size_per_gpu', 'num_worker_per_gpu') if opt['phase'] == 'train' else ('name',)
    problems += [f'{path}.{key}: missing' for key in required if key not in opt]
    problems += check_limits(f'{path}.', opt, LOADER_LIMITS)
    if hasattr(dataset, 'option_keys'):
        problems += unknown_keys(f'{path}.', opt, {*LOADER.split(), *dataset.option_keys})
    parts = opt.get('datasets') or {}  # a mixed data set has parts
    if not isinstance(parts, dict):
        return [*problems, f'{path}.datasets: has to be a section, not {parts!r}']
    for name, part in {path: opt, **{f'{path}.datasets.{name}': part for name, part in parts.items()}}.items():
        backend = part.get('io_backend') if isinstance(part, dict) else None
        if not isinstance(part, dict | None):
            problems.append(f'{name}: has to be a section, not {part!r}')
        elif not isinstance(backend, dict | None) or (backend and 'type' not in backend):
            problems.append(f'{name}.io_backend: has to be a section with a type, not {backend!r}')
        elif part and (backend or {'type': 'disk'})['type'] in ('disk', 'lmdb'):
            problems += check_files(name, part, ('dataroot', 'meta_info'))
    return problems


def check_metric(path: str, opt) -> list[str]:
    problems = check_call(registered('METRIC'), path, opt, given=('img', 'img2'), open_ended=False)
    if problems:
        return problems
    better = inspect.signature(look_up(registered('METRIC'), path, opt['type'])[0]).parameters.get('better')
    if better is not None and 'better' not in opt:
        problems = [f'{path}.better: missing; without better: {better.default} BasicSR takes the worst for the best']
    elif opt.get('better', 'higher') not in ('higher', 'lower'):
        problems = [f'{path}.better: {opt["better"]!r} is none of higher, lower']
    return problems


def check_call(known: dict, path: str, opt, given=(), required=(), open_ended=True) -> list[str]:
    """Problems with a section that holds a `type` and the arguments of what is known under it.

    Args:
        given: names of the arguments that the program supplies.
        required: names that are needed although they have a default.
        open_ended: whether a `**kwargs` takes any key. BasicSR's metrics have one, which swallows misspelt keys.
    """
    if not isinstance(opt, dict):
        return [f'{path}: has to be a section with a type, not {opt!r}']
    target, problems = look_up(known, f'{path}.type', opt.get('type'))
    if target is None:
        return problems
    parameters = inspect.signature(target).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {
        p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
    }
    missing = [name for name, p in named.items() if name not in opt and (p.default is p.empty or name in required)]
    problems += [f'{path}.{name}: missing' for name in missing]
    arguments = arguments_of(opt)
    if not takes_any:
        problems += unknown_keys(f'{path}.', arguments, {*named})
    elif not open_ended:
        problems += unknown_keys(f'{path}.', arguments, {*named, 'better'})  # BasicSR's key, passed on to the metric
    if is_ours(target):
        for name, value in arguments.items():
            if name in named:
                problems += check_kind(f'{path}.{name}', value, named[name].annotation)
    return problems or check_weights(path, target, arguments)


def check_weights(path: str, target, arguments: dict) -> list[str]:
    """Pre-trained weights that a loss or a metric will look for: whether there is such a file."""
    if target is vgg_perceptual_loss.VGGPerceptualLoss:
        try:
            vgg_perceptual_loss.find_vgg_weights(arguments.get('vgg_type', 'vgg19'), arguments.get('weights'))
        except (ValueError, FileNotFoundError) as error:
            return [describe(path, error)]
    elif getattr(target, '__name__', '') in ('LPIPSLoss', 'calculate_lpips') and is_ours(target):
        net = arguments.get('net', 'alex')
        if net not in BACKBONES:
            return [f'{path}.net: {net!r} is none of {", ".join(BACKBONES)}']
        file = Path(arguments.get('weights') or backbone_path(net)).expanduser()
        if not file.is_file():
            return [f'{path}: needs the ImageNet weights {BACKBONES[net].url}; download them, {file} does not exist']
    return []


def check_kind(path: str, value, wanted) -> list[str]:
    """Problem if a value is not of the kind that a function of ours declares; numbers as text: see `check_numbers`."""
    if wanted is inspect.Parameter.empty or is_kind(value, wanted) or is_number_as_text(value):
        return []
    return [f'{path}: has to be {kind_in_words(wanted)}, not {value!r}']


def check_limits(prefix: str, section: dict, limits: dict[str, tuple]) -> list[str]:
    """Values that are no numbers or out of range; numbers as text: see `check_numbers`."""
    problems = []
    for key, value in section.items():
        low, high, kind = limits.get(key, (None, None, None))
        if kind is None or is_number_as_text(value) or (value is None and prefix + key in MAY_BE_EMPTY):
            continue
        if not is_kind(value, kind) or not low <= value <= high:
            bounds = f'of at least {low}' if high == math.inf else f'from {low} to {high}'
            problems.append(f'{prefix}{key}: has to be {KINDS[kind]} {bounds}, not {value!r}')
    return problems


def unknown_keys(prefix: str, given, known: set[str]) -> list[str]:
    return [f'{prefix}{key}: unknown key{did_you_mean(key, known)}' for key in given if key not in known]


def check_files(path: str, opt: dict, prefixes: tuple[str, ...]) -> list[str]:
    """Files and folders that are named but do not exist."""
    named = {key: value for key, value in opt.items() if key.startswith(prefixes) and value is not None}
    pairs = [(key, name) for key, value in named.items() for name in (value if isinstance(value, list) else [value])]
    return [f'{path}.{key}: {name} does not exist' for key, name in pairs if not Path(str(name)).expanduser().exists()]


def check_numbers(path: str, value) -> list[str]:
    """Numbers that YAML 1.1 reads as text: it wants a point and a sign, 3.0e-4; a quoted number is text as well."""
    if isinstance(value, dict):
        parts = {f'{path}.{key}'.lstrip('.'): part for key, part in value.items() if not TEXT_KEYS.fullmatch(str(key))}
        return [problem for name, part in parts.items() for problem in check_numbers(name, part)]
    if isinstance(value, list):
        return [problem for index, part in enumerate(value) for problem in check_numbers(f'{path}[{index}]', part)]
    if not is_number_as_text(value):
        return []
    mantissa, _, exponent = value.lower().partition('e')
    number = f'{mantissa if "." in mantissa else mantissa + ".0"}e{int(exponent):+d}' if exponent else mantissa
    return [f'{path}: {value} is text in YAML; write {number}']
