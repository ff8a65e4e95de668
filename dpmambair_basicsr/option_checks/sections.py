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
import re
from copy import deepcopy
from pathlib import Path

import torch
import yaml
from basicsr.utils import options as basicsr_options

from dpmambair_basicsr.losses import vgg_perceptual_loss
from dpmambair_basicsr.losses.lpips_network import BACKBONES, backbone_path
from dpmambair_basicsr.option_checks.dry_run import check_on_trial
from dpmambair_basicsr.registry import (
    KINDS,
    arguments_of,
    describe,
    did_you_mean,
    is_kind,
    is_number_as_text,
    is_ours,
    kind_in_words,
    look_up,
    optimizers,
    registered,
    schedulers,
    will_resume,
)

# What BasicSR (1.4.2 and master) reads in each section, and what parse_options adds. In train also <name>_opt, a loss.
KNOWN = {
    'top': 'name model_type scale num_gpu manual_seed datasets network_g path train val logger dist_params '
    'find_unused_parameters dist rank world_size auto_resume is_train root_path',
    'train': 'total_iter warmup_iter ema_decay scheduler optim_g optim_d net_d_iters net_d_init_iters',
    'val': 'val_freq save_img suffix metrics pbar',
    'path': 'resume_state ignore_resume_networks experiments_root results_root models training_states log '
    'visualization',
    'logger': 'print_freq save_checkpoint_freq use_tb_logger wandb',
}
LOADER = (
    'name type phase scale io_backend batch_size_per_gpu num_worker_per_gpu dataset_enlarge_ratio prefetch_mode '
    'num_prefetch_queue pin_memory persistent_workers use_shuffle filename_tmpl mean std color'
)
# What BasicSR reads without a default, in training and in testing.
SECTIONS = {True: ('datasets', 'path', 'train', 'logger'), False: ('datasets', 'path', 'val')}
OPTIONAL_SECTIONS = ('val', 'dist_params')
REQUIRED = {
    True: {
        'train': 'total_iter scheduler optim_g',
        'logger': 'print_freq save_checkpoint_freq use_tb_logger',
        'val': 'val_freq save_img',
    },
    False: {'val': 'save_img'},
}
# What is compared or divided by: least and greatest value, and whether a float will do (BasicSR's files have 5.0e+3).
LIMITS = {
    'num_gpu': (0, math.inf, int),
    'scale': (1, math.inf, int),
    'train.total_iter': (1, math.inf, float),
    'train.warmup_iter': (-1, math.inf, float),
    'train.ema_decay': (0, 1, float),
    'train.grad_clip_norm': (0, math.inf, float),
    'train.max_skipped_steps': (0, math.inf, int),
    'train.net_d_iters': (1, math.inf, float),
    'train.net_d_init_iters': (0, math.inf, float),
    'val.val_freq': (1, math.inf, float),
    'logger.print_freq': (1, math.inf, float),
    'logger.save_checkpoint_freq': (1, math.inf, float),
    'logger.keep_last': (1, math.inf, int),
}
LOADER_LIMITS = {
    'batch_size_per_gpu': (1, math.inf, int),
    'num_worker_per_gpu': (0, math.inf, int),
    'num_prefetch_queue': (1, math.inf, int),
    'dataset_enlarge_ratio': (0, math.inf, float),
}
MAY_BE_EMPTY = ('train.grad_clip_norm', 'logger.keep_last')
TEXT_KEYS = re.compile(r'name|type|project|resume_id|dataroot.*|pretrain.*|(.*_)?(suffix|tmpl|root|file|state)')


def refuse(file: str, problems: list[str]) -> None:
    """Raises SystemExit (exit status 1) with all problems of an option file, if there are any."""
    if problems:
        count = '1 problem' if len(problems) == 1 else f'{len(problems)} problems'
        raise SystemExit('\n  '.join([f'{file}: {count} in the options:', *problems]))


def apply_forced(opt, forced: list[str]) -> list[str]:
    """Carries out `--force_yml section:key=value` on the file's options as BasicSR will, and returns its problems.

    BasicSR runs the keys as Python (utils/options.py:128), so nothing else than keys may be there.
    """
    problems = []
    for entry in forced if isinstance(opt, dict) else ():
        if not re.fullmatch(r'\s*[\w-]+(:[\w-]+)*\s*=[^=]*', entry):
            problems.append(f'--force_yml {entry}: is not of the form key=value or section:key=value')
            continue
        keys, _, text = entry.partition('=')
        *sections, key = keys.strip().split(':')
        section = opt
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            problems.append(f'--force_yml {entry}: the file has no such section')
            continue
        try:
            section[key] = basicsr_options._postprocess_yml_value(text.strip())
        except (ValueError, yaml.YAMLError) as error:
            problems.append(describe(f'--force_yml {entry}', error))
    return problems


def check_structure(opt, is_train: bool) -> list[str]:
    """Problems with what BasicSR's parse_options itself reads, where it ends with a bare KeyError or TypeError."""
    if not isinstance(opt, dict):
        return ['the file is not a mapping of keys to values']
    if wrong := keys_that_are_no_text(opt):
        return [f'{path}: the key has to be text, not {key!r}' for path, key in wrong]
    sections = {name: opt.get(name) for name in SECTIONS[is_train]}
    texts = {'name': opt.get('name')}
    if isinstance(opt.get('datasets'), dict):
        sections |= {f'datasets.{phase}': dataset for phase, dataset in opt['datasets'].items()}
        if is_train:
            sections.setdefault('datasets.train', None)
        for phase, dataset in opt['datasets'].items():
            if isinstance(dataset, dict):
                texts |= {f'datasets.{phase}.{key}': dataset.get(key) for key in ('dataroot_gt', 'dataroot_lq')}
    if isinstance(opt.get('path'), dict):
        files = re.compile(r'experiments_root|results_root|.*(resume_state|pretrain_network).*')
        texts |= {f'path.{key}': value for key, value in opt['path'].items() if files.fullmatch(str(key))}
    problems = [f'{key}: missing' for key in ('name', 'model_type', 'num_gpu') if opt.get(key) is None]
    problems += [f'{path}: missing' for path, section in sections.items() if section is None]
    sections |= {name: opt[name] for name in OPTIONAL_SECTIONS if name in opt}
    wrong = {path: section for path, section in sections.items() if not isinstance(section, dict | None)}
    problems += [f'{path}: has to be a section, not {value!r}' for path, value in wrong.items()]
    problems += [
        f'{path}: has to be text, not {value!r}' for path, value in texts.items() if not isinstance(value, str | None)
    ]
    if type(opt.get('manual_seed', 0)) is not int and opt['manual_seed'] is not None:
        problems.append(f'manual_seed: has to be a whole number, not {opt["manual_seed"]!r}')
    return problems


def keys_that_are_no_text(value, path: str = '') -> list[tuple[str, object]]:
    """The path and key of each, in sections and lists of any depth."""
    if isinstance(value, dict):
        found = [(f'{path}{key}', key) for key in value if not isinstance(key, str)]
        return found + [wrong for key, part in value.items() for wrong in keys_that_are_no_text(part, f'{path}{key}.')]
    parts = enumerate(value) if isinstance(value, list) else ()
    return [wrong for index, part in parts for wrong in keys_that_are_no_text(part, f'{path}{index}.')]


def check_root(opt: dict, wanted: dict) -> list[str]:
    """Problem if `path.experiments_root` or `results_root` of the file, `wanted`, is no folder of BasicSR's.

    A folder that exists is renamed as a whole when a run starts: one that holds other things must not be.
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
        return [f'path.{key}: {folder} holds other things than a run, and would be renamed; name a folder of its own']
    return []


def is_of_a_run(file: Path) -> bool:
    """Not any yml file: the copy that BasicSR puts there."""
    return file.suffix != '.yml' or file.read_bytes().startswith(b'# GENERATE TIME')


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


def check_renamed(opt: dict) -> list[str]:
    """Checkpoints in the folder that BasicSR renames when this training starts: it would not find them any more."""
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
        f'path.{key}: {file} is in the folder of this run, which is renamed when it starts; change the name of the run'
        for key, file in inside
    ]


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
