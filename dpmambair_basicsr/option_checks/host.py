"""What BasicSR's loop finds out only when it has renamed the folder of the finished run, and what it leaves out unsaid.

Both are of any model, BasicSR's own too: `check_start` names what no run survives, `notes` is what the log has to say.
"""

import os
import sys
from collections import Counter
from importlib.util import find_spec

import torch

from dpmambair_basicsr.ops.selective_scan.backend import BackendError, check_backend
from dpmambair_basicsr.option_checks.schema import OPTIONS, SCAN_BACKEND, SET_BY_BASICSR
from dpmambair_basicsr.option_checks.values import check_value

PREFETCH_MODE = next(row for row in OPTIONS if row.name == 'prefetch_mode')
NOT_FOLDERS = ('strict_load', 'pretrain_network', 'resume', 'param_key')  # of `path`; BasicSR makes the others


def check_start(opt: dict) -> list[str]:
    """Problems with devices, loaders, loggers and folders, of the options that parse_options returns."""
    problems = []
    if not torch.cuda.is_available() and opt['num_gpu'] != 0:
        problems.append(f'num_gpu: {opt["num_gpu"]}, but PyTorch finds no CUDA device; write 0 or auto')
    if 'TORCHELASTIC_RUN_ID' in os.environ and os.environ.get('WORLD_SIZE') != '1' and not opt['dist']:
        problems.append('--launcher: torchrun started several processes, which would all train alone; add pytorch')
    problems += check_loaders(opt) + check_scan_backend(opt) + (check_loggers(opt) if opt['is_train'] else [])
    folders = {key: value for key, value in opt['path'].items() if not any(part in key for part in NOT_FOLDERS)}
    problems += [
        f'path.{key}: expected a folder, got {value!r}' for key, value in folders.items() if not isinstance(value, str)
    ]
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


def check_loaders(opt: dict) -> list[str]:
    """Loaders that do not work so."""
    problems, cuda = [], torch.cuda.is_available()
    for phase, dataset in opt['datasets'].items():
        path, mode = f'datasets.{phase}', dataset.get('prefetch_mode')
        kinds = ('val',) if opt['is_train'] else ('test', 'val')
        if phase != 'train' and phase.split('_')[0] not in kinds:
            problems.append(f'{path}: unknown dataset; choices: train, {", ".join(kinds)}, {kinds[-1]}_<name>')
        problems += check_value(f'{path}.prefetch_mode', mode, PREFETCH_MODE)
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


def check_loggers(opt: dict) -> list[str]:
    """Loggers that are not installed, or not asked for in full."""
    if 'debug' in opt['name']:  # BasicSR opens none, see `notes`
        return []
    logger, problems = opt['logger'], []
    if uses_wandb(opt):
        if logger.get('use_tb_logger') is not True:
            problems.append('logger.use_tb_logger: wandb needs true, it follows the TensorBoard log')
        if find_spec('wandb') is None:
            problems.append('logger.wandb: wandb is not installed; pip install wandb, or write project: ~')
    if logger.get('use_tb_logger') and find_spec('tensorboard') is None:
        problems.append('logger.use_tb_logger: tensorboard is not installed; pip install tensorboard, or write false')
    return problems


def uses_wandb(opt: dict) -> bool:
    wandb = opt['logger'].get('wandb')
    return isinstance(wandb, dict) and wandb.get('project') is not None


def check_overwritten(raw: dict, opt: dict) -> list[str]:
    """What the file says and BasicSR replaces: `raw` are the file's options, `opt` what parse_options makes of them."""
    pairs = {'': (raw, opt), 'path.': (raw['path'], opt['path'])}
    keys = {'': SET_BY_BASICSR[''], 'path.': SET_BY_BASICSR['path']}
    for phase, dataset in raw['datasets'].items():
        pairs[f'datasets.{phase}.'] = dataset, opt['datasets'][phase]
        keys[f'datasets.{phase}.'] = {*SET_BY_BASICSR['datasets'], 'scale'}
    return [
        f'{prefix}{key}: {given[key]!r} is replaced by {used.get(key)!r}; leave it out'
        for prefix, (given, used) in pairs.items()
        for key in sorted(keys[prefix])
        if key in given and given[key] != used.get(key)
    ]


def check_unique_names(opt: dict) -> list[str]:
    """Datasets of one name, whose images and results BasicSR writes over each other."""
    names = [dataset.get('name') for phase, dataset in opt['datasets'].items() if phase != 'train']
    counts = Counter(name for name in names if isinstance(name, str))
    return [
        f'datasets: {count} of the sets that are validated or tested have the name {name!r}; their images and results '
        'would replace each other'
        for name, count in counts.items()
        if count > 1
    ]


def notes(opt: dict) -> list[str]:
    """What BasicSR does not do although the options say it, or does although they do not."""
    lines = []
    if opt['is_train'] and '--debug' in sys.argv:
        lines.append('--debug: val_freq and save_checkpoint_freq are 8, print_freq is 1, in a folder of its own')
    elif opt['is_train'] and 'debug' in opt['name'] and (opt['logger'].get('use_tb_logger') or uses_wandb(opt)):
        lines.append("name: has 'debug' in it, so BasicSR writes no TensorBoard or wandb log; rename the run for one")
    gpus = torch.cuda.device_count()
    if isinstance(opt['num_gpu'], int) and opt['num_gpu'] > gpus and not opt['dist']:
        lines.append(f'num_gpu: {opt["num_gpu"]}, but there are {gpus}: they share batches made for {opt["num_gpu"]}')
    for phase, dataset in opt['datasets'].items():
        if phase == 'train' and dataset.get('use_shuffle') is False:
            lines.append('datasets.train.use_shuffle: false is not read, BasicSR shuffles always')
        unread = {'batch_size_per_gpu': 1, 'num_worker_per_gpu': 0, 'dataset_enlarge_ratio': 1}
        for key, value in unread.items() if phase != 'train' else ():
            if dataset.get(key, value) != value:
                lines.append(f'datasets.{phase}.{key}: {dataset[key]} is not read, outside training it is {value}')
        reads_no_list = dataset.get('type') in ('PairedImageDataset', 'SingleImageDataset')
        on_lmdb = (dataset.get('io_backend') or {}).get('type') == 'lmdb'
        if on_lmdb and reads_no_list and dataset.get('meta_info_file'):
            lines.append(f'datasets.{phase}.meta_info_file: is not read with lmdb, which has a list of its own')
        if on_lmdb and dataset.get('filename_tmpl', '{}') != '{}':
            lines.append(f'datasets.{phase}.filename_tmpl: is not read with lmdb, where pairs have one key')
        if dataset.get('type') == 'RealESRGANDataset' and dataset.get('gt_size', 400) != 400:
            lines.append(
                f'datasets.{phase}.gt_size: is not read by RealESRGANDataset, whose images have 400 pixels a side'
            )
    if not opt['is_train'] and not opt['path'].get('pretrain_network_g'):
        lines.append('path.pretrain_network_g: none, so what is tested is a network with random weights')
    return lines
