"""Checks an option file against the code that will read it, before anything is created.

`host.py` calls this when BasicSR parses its options. A file for one of BasicSR's own models gets only the checks that
no working file fails; the others need to know which keys are read, which our classes declare:
    a model class: `option_keys = {'train': frozenset({...}), 'val': ..., 'path': ..., 'logger': ..., 'top': ...}`,
    what it reads beside KNOWN; those of its base classes are added;
    a data set class: `option_keys = frozenset({...})`, what it reads beside LOADER.
"""

import difflib
import inspect
import re
from copy import deepcopy
from pathlib import Path

import torch
from basicsr.models import lr_scheduler as basicsr_schedulers
from basicsr.utils import registry

from dpmambair_basicsr.models import lr_scheduler as our_schedulers

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
REQUIRED = {
    True: {
        'train': 'total_iter scheduler optim_g',
        'logger': 'print_freq save_checkpoint_freq use_tb_logger',
        'val': 'val_freq save_img',
    },
    False: {'val': 'save_img'},
}
NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')
TEXT_KEYS = re.compile(r'name|type|project|resume_id|dataroot.*|pretrain.*|(.*_)?(suffix|tmpl|root|file|state)')


def refuse(file: str, problems: list[str]) -> None:
    """Raises SystemExit (exit status 1) with all problems of an option file, if there are any."""
    if problems:
        count = '1 problem' if len(problems) == 1 else f'{len(problems)} problems'
        raise SystemExit('\n  '.join([f'{file}: {count} in the options:', *problems]))


def check_structure(opt, is_train: bool) -> list[str]:
    """Problems with what BasicSR's parse_options itself reads; without it, it ends with a bare KeyError."""
    if not isinstance(opt, dict):
        return ['the file is not a mapping of keys to values']
    sections = {name: opt.get(name) for name in SECTIONS[is_train]}
    if isinstance(opt.get('datasets'), dict):
        sections |= {f'datasets.{phase}': dataset for phase, dataset in opt['datasets'].items()}
        if is_train:
            sections.setdefault('datasets.train', None)
    problems = [f'{key}: missing' for key in ('name', 'model_type', 'num_gpu') if key not in opt]
    problems += [f'{path}: missing' for path, section in sections.items() if section is None]
    wrong = {path: section for path, section in sections.items() if not isinstance(section, dict | None)}
    return problems + [f'{path}: has to be a section, not {value!r}' for path, value in wrong.items()]


def check_forced(opt: dict, forced: list[str]) -> list[str]:
    """Problems with `--force_yml section:key=value`; BasicSR runs the keys as Python (utils/options.py:128)."""
    problems = []
    for entry in forced:
        section = opt
        for key in entry.partition('=')[0].strip().split(':')[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if not re.fullmatch(r'\s*[\w-]+(:[\w-]+)*\s*=[^=]*', entry):
            problems.append(f'--force_yml {entry}: is not of the form key=value or section:key=value')
        elif not isinstance(section, dict):
            problems.append(f'--force_yml {entry}: the file has no such section')
    return problems


def check_options(opt: dict) -> list[str]:
    """Problems of the options that parse_options returns, each 'section.key: what is wrong'; `opt` stays as it is."""
    opt = deepcopy(opt)
    problems = check_devices(opt)
    model, problem = look_up(registered('MODEL'), 'model_type', opt['model_type'])
    if not hasattr(model, 'option_keys'):
        return problems + problem
    networks = [key for key in opt if key.startswith('network_')]
    problems += check_sections(opt, model, networks)
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
    for name, metric in ((opt.get('val') or {}).get('metrics') or {}).items():
        given = ('img', 'img2')
        problems += check_call(registered('METRIC'), f'val.metrics.{name}', metric, given, open_ended=False)
    files = ('resume_state',) if will_resume(opt) else ('resume_state', 'pretrain_network')
    return problems + check_files('path', opt['path'], files) + check_numbers('', opt)


def check_devices(opt: dict) -> list[str]:
    """CUDA asked for where there is none: otherwise a raw CUDA error, late (models/base_model.py:18)."""
    if torch.cuda.is_available():
        return []
    problems = []
    if opt['num_gpu'] != 0:
        problems.append(f'num_gpu: {opt["num_gpu"]}, but PyTorch finds no CUDA device; write 0 or auto')
    for phase, dataset in opt['datasets'].items():
        if dataset.get('prefetch_mode') == 'cuda':
            problems.append(f'datasets.{phase}.prefetch_mode: cuda, but PyTorch finds no CUDA device; write ~')
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
    if hasattr(dataset, 'option_keys'):
        problems += unknown_keys(f'{path}.', opt, {*LOADER.split(), *dataset.option_keys})
    parts = {path: opt} | {f'{path}.datasets.{name}': part for name, part in (opt.get('datasets') or {}).items()}
    for name, part in parts.items():  # a mixed data set has parts
        if isinstance(part, dict) and (part.get('io_backend') or {}).get('type', 'disk') in ('disk', 'lmdb'):
            problems += check_files(name, part, ('dataroot', 'meta_info'))
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
    target, problems = look_up(known, f'{path}.type', opt.pop('type', None))
    if target is None:
        return problems
    parameters = inspect.signature(target).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {
        p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
    }
    missing = [name for name, p in named.items() if name not in opt and (p.default is p.empty or name in required)]
    problems += [f'{path}.{name}: missing' for name in missing]
    if not takes_any:
        problems += unknown_keys(f'{path}.', opt, {*named})
    elif not open_ended:
        problems += unknown_keys(f'{path}.', opt, {*named, 'better'})  # BasicSR's key, passed on to the metric
    return problems


def look_up(known: dict, path: str, name) -> tuple[object, list[str]]:
    """What is known under `name`, or None, and the problem."""
    target = known.get(name, known.get(f'{name}_basicsr'))  # BasicSR's suffix for its own, see Registry.get
    if target is not None:
        return target, []
    return None, [f'{path}: missing' if name is None else f'{path}: unknown type {name}{did_you_mean(name, known)}']


def will_resume(opt: dict) -> bool:
    """Whether BasicSR will ignore path.pretrain_network_*: a run may outlive the files it started from."""
    states = Path(opt['path'].get('training_states', '')).glob('*.state') if opt['auto_resume'] else ()
    return any(states) or bool(opt['path'].get('resume_state'))


def unknown_keys(prefix: str, given, known: set[str]) -> list[str]:
    return [f'{prefix}{key}: unknown key{did_you_mean(key, known)}' for key in given if key not in known]


def did_you_mean(name, choices) -> str:
    near = difflib.get_close_matches(str(name), choices, n=1)
    return f', did you mean {near[0]}?' if near else f'; choices: {", ".join(sorted(choices))}'


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
    if not (isinstance(value, str) and NUMBER.fullmatch(value)):
        return []
    mantissa, _, exponent = value.lower().partition('e')
    number = f'{mantissa if "." in mantissa else mantissa + ".0"}e{int(exponent):+d}' if exponent else mantissa
    return [f'{path}: {value} is text in YAML; write {number}']


def registered(kind: str) -> dict[str, object]:
    return dict(iter(getattr(registry, f'{kind}_REGISTRY')))


def optimizers() -> dict[str, type]:
    return subclasses(torch.optim.Optimizer, torch.optim)


def schedulers() -> dict[str, type]:
    """BasicSR's and ours; MultiStepLR is BasicSR's other name for MultiStepRestartLR (models/base_model.py:114)."""
    found = subclasses(torch.optim.lr_scheduler.LRScheduler, basicsr_schedulers, our_schedulers)
    return found | {'MultiStepLR': basicsr_schedulers.MultiStepRestartLR}


def subclasses(base: type, *modules) -> dict[str, type]:
    public = {name: value for module in modules for name, value in vars(module).items() if not name.startswith('_')}
    return {name: value for name, value in public.items() if inspect.isclass(value) and base in value.__mro__[1:]}
