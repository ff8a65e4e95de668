"""Checks that build or read what an option file names: networks, datasets, optimizers, checkpoints."""

import contextlib
import inspect
import io
import math
import re
import sys
import warnings
from collections.abc import Iterable
from copy import deepcopy
from os import path as osp
from pickle import UnpicklingError
from typing import Any

import torch

from dpmambair_basicsr.data.basicsr_datasets import channels, paths_by_folder
from dpmambair_basicsr.data.degradations import DEGRADATIONS
from dpmambair_basicsr.files.checkpoints import differences, read_checkpoint, select_weights, wanted_keys
from dpmambair_basicsr.files.image_folders import some
from dpmambair_basicsr.files.image_lists import missing_files
from dpmambair_basicsr.files.images import fit_crop
from dpmambair_basicsr.option_checks.schema import rows_of
from dpmambair_basicsr.option_checks.values import will_resume
from dpmambair_basicsr.registry import (
    arguments_of,
    describe,
    find_optimizer,
    look_up,
    make_without_storage,
    our_type,
    registered,
    told_by_weights,
)
from dpmambair_basicsr.training.earlier_options import complete_networks
from dpmambair_basicsr.training.extractor import read_extractor, stage_1_checkpoint
from dpmambair_basicsr.training.lr_schedulers import schedulers
from dpmambair_basicsr.training.parameters import freeze

# Image datasets whose constructors only list their files.
IMAGE_DATASETS = tuple(
    f'basicsr.data.{name}_dataset' for name in ('paired_image', 'single_image', 'realesrgan', 'realesrgan_paired')
)
# Parameters of networks, ours and BasicSR's, with the number of image channels.
CHANNELS = ('inp_channels', 'out_channels', 'num_in_ch', 'num_out_ch', 'in_chans')


def check_by_dry_run(opt: dict, model: Any, reported: list[str]) -> list[str]:
    """Problems that show only when networks, datasets and optimizers are built in a dry run, or files are read.

    Sections with known problems are skipped.
    """
    problems = []

    def attempt(path: str, make, *arguments) -> Any:
        if any(re.match(rf'{re.escape(path)}[.:\[]', problem) for problem in reported):
            return None
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter('ignore')
                return make(*arguments)
        except Exception as error:  # any: it would end the run later
            problems.append(describe(path, error))
            return None

    is_checked = hasattr(model, 'option_keys')
    if opt['is_train'] and hasattr(model, 'check_training') and not reported:
        attempt('model_type', model.check_training, opt)
    if is_checked and not will_resume(opt):
        with contextlib.suppress(OSError, ValueError):  # of a file that cannot be read; reported below
            complete_networks(opt)
    networks = {}
    for key, section in opt.items():
        target = our_type('ARCH', section) if str(key).startswith('network_') else None
        if target is not None:
            networks[key] = attempt(key, make_without_storage, target, arguments_of(section))
            scale = getattr(networks[key], 'scale', None)
            if isinstance(scale, int) and scale != opt.get('scale', 1):
                problems.append(f'{key}.scale: {scale}, but scale is {opt.get("scale", 1)}')
        if is_checked and isinstance(section, dict) and str(key).startswith('network_'):
            attempt(key, check_channels, section, opt['datasets'])
    for phase, section in opt['datasets'].items():
        target = our_type('DATASET', section)
        is_saved = is_checked and phase != 'train' and (not opt['is_train'] or (opt.get('val') or {}).get('save_img'))
        if target is None:
            attempt(f'datasets.{phase}', check_basicsr_dataset, section, is_checked, is_saved)
        dataset = None if target is None else attempt(f'datasets.{phase}', target, deepcopy(section))
        if getattr(networks.get('network_g'), 'needs_label', False):
            if dataset is not None and not getattr(dataset, 'has_labels', True):
                names = f': {dataset.unlabelled()}' if hasattr(dataset, 'unlabelled') else ''
                problems.append(
                    f'datasets.{phase}: no labels, which network_g needs; not of a known degradation{names}'
                )
            if is_checked and is_unlabelled(section):
                problems.append(f'datasets.{phase}: no labels, which network_g needs; {section["type"]} has none')
            attempt('network_g.num_degradations', check_labels, phase, dataset, networks['network_g'])
        if dataset is not None:
            if is_saved:
                attempt(f'datasets.{phase}', check_saved_names, map(dataset.lq_path, range(len(dataset))))
            fit = attempt(f'datasets.{phase}', check_pairs, dataset)
            if phase == 'train':
                attempt('datasets.train', check_batches, opt, len(dataset))
            if phase == 'train' and fit:
                attempt('datasets.train.gt_size', check_crop, dataset)
    if networks.get('network_g') is not None:
        attempt('val.tile', check_tile, opt, networks['network_g'])
        if opt['is_train']:
            attempt('datasets.train.gt_size', check_crop_size, opt, networks['network_g'])
        if opt['is_train'] and is_checked and isinstance(patterns := opt['train'].get('freeze'), list):
            attempt('network_g', freeze, networks['network_g'], patterns)
    if opt['is_train'] and is_checked:
        for key, section in opt['train'].items():
            loss = our_type('LOSS', section) if key.endswith('_opt') else None
            if loss is not None and hasattr(loss, 'least_size'):
                attempt(f'train.{key}', check_least_size, opt, section['type'], loss.least_size(section))
            if loss is not None and hasattr(loss, 'crop_unit'):
                attempt(f'train.{key}', check_crop_unit, opt, loss, section)
    if is_checked:
        for key, section in (opt.get('train') or {}).items():
            if key.startswith('optim_'):
                attempt(f'train.{key}', check_optimizer, section)
            elif key.startswith('scheduler') and section is not None:
                attempt(f'train.{key}', make_scheduler, section)
    if not will_resume(opt):
        for key, file in opt['path'].items():
            network = key.removeprefix('pretrain_')
            if file is None or not key.startswith('pretrain_network_') or network == 'network_e':
                continue
            if networks.get(network) is not None or (is_checked and network in opt):
                attempt(f'path.{key}', check_checkpoint, opt, network, networks.get(network))
        fits = not any(problem.startswith('path.pretrain_network_g: ') for problem in problems)
        if opt['is_train'] and is_checked and networks.get('network_g') is not None and fits:
            attempt('path.pretrain_network_e', check_extractor, opt['path'], networks['network_g'])
    return problems


def check_basicsr_dataset(section: dict, is_checked: bool, is_saved: bool) -> None:
    """Raises what the constructor of BasicSR's own image datasets raises, or ValueError if files are missing.

    If its images are saved, their names must differ. Other datasets may take long to build. For BasicSR's own models,
    which tolerate missing files, only the pairs of a list have to exist; the log names the others, see
    `patches.fixes`.
    """
    target, _ = look_up(registered('DATASET'), '', section.get('type'))
    if getattr(target, '__module__', '') not in IMAGE_DATASETS:
        return
    dataset = target(deepcopy(section))
    if is_saved:
        check_saved_names(dataset.paths)
    for folder, paths in paths_by_folder(dataset, section):
        missing = missing_files(folder, paths)
        if not is_checked:
            missing = [path for path in missing if path in paths and 'meta_info_file' in section]
        if missing:
            raise ValueError(f'{folder}: {some(missing)} cannot be read: broken links or missing files')


def check_saved_names(items: Iterable[str | dict[str, str]]) -> None:
    """Raises ValueError if two images have one name, of the file without its folder, as BasicSR names what it saves.

    Args:
        items: path of the degraded image, or paths of a pair, for each image.
    """
    found = {}
    for item in items:
        path = item['lq_path'] if isinstance(item, dict) else item
        name = osp.splitext(osp.basename(path))[0]
        if (other := found.setdefault(name, item)) != item:
            pair = [each['gt_path'] if isinstance(each, dict) else each for each in (other, item)]
            raise ValueError(f'{" and ".join(pair)} are both {name} in the results, and would replace each other')


def check_channels(section: dict, datasets: dict) -> None:
    """Raises ValueError if the input or output channels of a network differ from those of the datasets."""
    target, _ = look_up(registered('ARCH'), '', section.get('type'))
    parameters = {} if target is None else inspect.signature(target).parameters
    of_datasets = {channels(opt.get('type'), opt) for opt in datasets.values()}
    if len(of_datasets) != 1 or None in of_datasets:
        return
    for name in (name for name in CHANNELS if name in parameters):
        value = section.get(name, parameters[name].default)
        if isinstance(value, int) and value not in of_datasets:
            raise ValueError(f'{name} is {value}, but the images of the datasets have {of_datasets.pop()} channels')


def check_optimizer(section: dict) -> None:
    """Raises what an optimizer raises when constructed or stepped, or ValueError if its state cannot be resumed."""
    target, _ = find_optimizer('', section['type'])
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = target([parameter], **arguments_of(section))
    if target.__module__.startswith('torch.optim'):
        return
    parameter.grad = torch.ones(1)
    optimizer.step()
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    state.seek(0)
    try:
        torch.load(state, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f'{section["type"]}: torch.load(weights_only=True) cannot read its state') from error


def make_scheduler(section: dict) -> torch.optim.lr_scheduler.LRScheduler:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return schedulers()[section['type']](optimizer, **arguments_of(section))


def check_batches(opt: dict, items: int) -> None:
    """Raises ValueError if there is not a single full batch: BasicSR drops incomplete ones."""
    train = opt['datasets']['train']
    ratio, size = train.get('dataset_enlarge_ratio', 1), train['batch_size_per_gpu']
    if not opt['dist']:
        size *= max(opt['num_gpu'], 1)
    size *= micro_batches(opt)
    if math.ceil(items * ratio / opt['world_size']) < size:
        raise ValueError(no_batch(items, size, ratio, opt['world_size']))


def micro_batches(opt: dict) -> int:
    """`train.accum_iter`, for models that support it; BasicSR's do not."""
    model, _ = look_up(registered('MODEL'), 'model_type', opt['model_type'])
    return opt['train'].get('accum_iter', 1) if any(row.name == 'accum_iter' for row in rows_of(model)) else 1


def is_unlabelled(section: dict) -> bool:
    """Whether this is one of BasicSR's image datasets, which have no labels; a fork's may."""
    target, _ = look_up(registered('DATASET'), '', section.get('type'))
    module = getattr(target, '__module__', '')
    return module in IMAGE_DATASETS and "'label'" not in inspect.getsource(sys.modules[module])


def check_labels(phase: str, dataset: Any, net: Any) -> None:
    """Raises ValueError if the network has no embedding for a label of the dataset."""
    label = max(getattr(dataset, 'labels', ()), default=-1)
    if label >= net.num_degradations:
        name = list(DEGRADATIONS)[label]
        raise ValueError(
            f'{net.num_degradations}, but datasets.{phase} has the label {label} ({name}), which needs {label + 1}'
        )


def parts_on_disk(dataset) -> list:
    """A set's parts, or itself; not those of lmdb: no database may be open when the loader's workers are forked."""
    return [part for part in getattr(dataset, 'datasets', [dataset]) if part.opt['io_backend']['type'] == 'disk']


def check_pairs(dataset) -> bool:
    """Raises ValueError if the first pair, or the first of a part, has sizes that differ; otherwise True."""
    for part in parts_on_disk(dataset):
        if hasattr(part, 'read_pair'):
            part.read_pair(0)
    return True


def check_crop(dataset) -> None:
    """Raises ValueError if the first image, or the first of a part, is smaller than the crops; others are unchecked."""
    for part in parts_on_disk(dataset):
        path = part.paths[0]
        path = path['gt_path'] if isinstance(path, dict) else path
        fit_crop(part.images.read(path, 'gt', 0), part.opt['gt_size'], part.opt['pad_small'], path, 0)


def check_crop_size(opt: dict, net: torch.nn.Module) -> None:
    """Raises ValueError if the network would pad the crops, and so train on padding."""
    scale = opt.get('scale', 1)
    unit = scale * getattr(net, 'stride', 1)
    if wrong := [size for size in crop_sizes(opt) if size % unit]:
        raise ValueError(
            f'{wrong[0]} is not a multiple of {unit}: {type(net).__name__} would pad each crop at scale {scale}'
        )


def crop_sizes(opt: dict) -> list[int]:
    """Sizes of the clean crops that the model is trained on."""
    train = opt['datasets']['train']
    # Real-ESRGAN's dataset has crops that the model cuts once more, to the gt_size at the top of the file.
    sizes = [opt.get('gt_size', train.get('gt_size')), *(train.get('progressive') or {}).get('gt_sizes', ())]
    return [size for size in sizes if isinstance(size, int)]


def check_least_size(opt: dict, loss: str, least: int) -> None:
    """Raises ValueError if the crops are too small for a loss."""
    if small := [size for size in crop_sizes(opt) if size < least]:
        raise ValueError(f'{loss} needs crops of at least {least}, and datasets.train has {small[0]}')


def check_crop_unit(opt: dict, loss: Any, section: dict) -> None:
    """Raises ValueError if a loss cannot be constructed, or cannot divide the crops into parts."""
    unit = loss.crop_unit(arguments_of(section))
    if wrong := [size for size in crop_sizes(opt) if size % unit]:
        raise ValueError(f'{section["type"]} needs crops of a multiple of {unit}, and datasets.train has {wrong[0]}')


def check_tile(opt: dict, net: torch.nn.Module) -> None:
    """Raises ValueError if tiles are smaller than the stride of the network."""
    tile, stride = (opt.get('val') or {}).get('tile') or 0, getattr(net, 'stride', 1)
    if 0 < tile < stride:
        raise ValueError(f'{tile} is less than {stride}, the minimum of {type(net).__name__}')


def no_batch(items: int, batch_size: int, ratio: float, processes: int) -> str:
    return (
        f'{items} items times dataset_enlarge_ratio {ratio}, shared by {processes} process(es), '
        f'are less than one batch of {batch_size}; raise dataset_enlarge_ratio or lower batch_size_per_gpu'
    )


def check_checkpoint(opt: dict, network: str, net: torch.nn.Module | None) -> None:
    """Raise ValueError if `pretrain_<network>` cannot be read, or does not match the network, if that is ours."""
    path = opt['path']
    file, name = path[f'pretrain_{network}'], network.removeprefix('network_')
    checkpoint = read_checkpoint(file)
    weights = select_weights(file, checkpoint, *wanted_keys(path, name, opt['is_train']))
    if net is not None:
        told_by_weights(type(net), opt[network], weights, file)  # raises for weights that are no longer supported
    report = differences(net, weights) if net is not None and path.get(f'strict_load_{name}', True) else ''
    if report:
        raise ValueError(f'{file}: {other_options(checkpoint.get(network), opt[network], network)}{report}')


def other_options(of_file: dict | None, wanted: dict, network: str) -> str:
    """How the saved network differs from that in the options, if the file records it."""
    found = [
        f'{key} {value!r} (options: {wanted.get(key, "its default")!r})'
        for key, value in (of_file or {}).items()
        if value != wanted.get(key)
    ]
    return f'its {network} has {", ".join(found)}; ' if found else ''


def check_extractor(path: dict, net: torch.nn.Module) -> None:
    """Raises ValueError if a network does not get the frozen extractor that it needs."""
    file = stage_1_checkpoint(net, path)
    if file is not None:
        with torch.device('meta'):
            read_extractor(net, file)
