"""What BasicSR gets wrong on today's stack, one function per mend, and the hook that registers us with it.

BasicSR's files are never edited. `prepare` supplies modules that BasicSR imports and nobody has any more; `mend`
replaces single functions once BasicSR is imported. Each docstring says what breaks, where in BasicSR 1.4.2, and when
the mend can go. No mend asks for a version: a stand-in is used only where the module is missing, a replacement is right
wherever the function exists, and what a fork does not have is left alone. Nothing here imports torch or BasicSR before
BasicSR itself has been imported.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pkgutil
import re
import sys
import warnings
from pathlib import Path

from dpmambair_basicsr.command_line import command_line
from dpmambair_basicsr.patching import MENDS, replaces

# Before BasicSR is imported: modules that are gone.


def functional_tensor(module) -> None:
    """torchvision 0.17 removed `torchvision.transforms.functional_tensor`; data/degradations.py:8 imports it.

    Can go when BasicSR 1.4.2 is no longer supported: master imports from `functional`.
    """
    from torchvision.transforms.functional import rgb_to_grayscale

    module.rgb_to_grayscale = rgb_to_grayscale


def distutils(module) -> None:
    """Python 3.12 removed distutils; archs/arch_util.py:6 imports `distutils.version`. See `distutils_version`."""


def distutils_version(module) -> None:
    """Python 3.12 removed distutils; archs/arch_util.py:6 compares torchvision's version with its LooseVersion.

    setuptools brings distutils back, so this is for environments without it. Can go when BasicSR stops importing it.
    """

    class LooseVersion(list):
        def __init__(self, version: str):
            super().__init__(int(number) for number in re.findall(r'\d+', version.partition('+')[0]))

    module.LooseVersion = LooseVersion


def basicsr_version(module) -> None:
    """basicsr/version.py is made by setup.py and ignored by git, so a raw clone lacks it; __init__.py:12 imports it.

    Can go when BasicSR keeps its version in a tracked file.
    """
    file = Path(sys.modules['basicsr'].__path__[0]).parent / 'VERSION'
    module.__version__ = file.read_text().strip() if file.is_file() else 'unknown'
    module.__gitsha__ = 'unknown'


STAND_INS = {
    'torchvision.transforms.functional_tensor': functional_tensor,
    'distutils': distutils,
    'distutils.version': distutils_version,
    'basicsr.version': basicsr_version,
}


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on sys.meta_path, so it is asked only for modules that nobody else has."""

    def find_spec(self, name, path=None, target=None):
        if name in STAND_INS:
            return importlib.util.spec_from_loader(name, self, is_package=name == 'distutils')
        return None

    def exec_module(self, module) -> None:
        STAND_INS[module.__name__](module)


def prepare() -> None:
    """Makes BasicSR importable; call it before BasicSR is imported. May be repeated."""
    if not any(type(finder).__name__ == 'StandInFinder' for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `callback` right after the module `name` has been executed, each time it is."""

    def __init__(self, name: str, callback):
        self.name, self.callback = name, callback

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self.callback()

            spec.loader.exec_module = exec_module
        return spec


def when_basicsr_is_imported(register) -> None:
    """Calls `register` when BasicSR's five kinds of modules are there, at once if they are.

    `basicsr/__init__` imports archs, data, losses, metrics and models in this order, then among others `basicsr.test`.
    If a file in basicsr/models imports us, models is half-way, so the one after it has to do.
    """

    def register_if_possible():
        try:
            if importlib.util.find_spec('basicsr.utils.registry') is None:
                return  # BasicSR before 1.3, such as NAFNet's and Restormer's: there is nothing to register with
            register()
        except Exception as error:  # a foreign basicsr that we do not fit must still be importable
            package = ', '.join(sys.modules['basicsr'].__path__)
            message = f'dpmambair_basicsr is not registered with {package}: {type(error).__name__}: {error}'
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    models = sys.modules.get('basicsr.models')
    if models is None or getattr(models.__spec__, '_initializing', False):
        if not any(type(finder).__name__ == 'AfterImport' for finder in sys.meta_path):
            name = 'basicsr.models' if models is None else 'basicsr.test'
            sys.meta_path.insert(0, AfterImport(name, register_if_possible))
    else:
        register_if_possible()


# Once BasicSR is imported: functions that fail.


def mend() -> None:
    """Applies every mend to the imported BasicSR. May be repeated."""
    from dpmambair_basicsr import host_training  # noqa: F401  (its mends are noted when it is imported)

    for owner_name, attribute, make in MENDS:
        try:
            owner = pkgutil.resolve_name(owner_name)
            original = getattr(owner, attribute)
        except (ImportError, AttributeError):
            continue  # a fork without it
        if hasattr(original, 'mended_by'):
            continue
        replacement = functools.update_wrapper(make(original), original)
        replacement.mended_by = __name__
        setattr(owner, attribute, replacement)
        for name in ('basicsr.train', 'basicsr.test', '__main__'):  # these import functions by name
            if getattr(sys.modules.get(name), attribute, None) is original:
                setattr(sys.modules[name], attribute, replacement)


@replaces('basicsr.utils.options', 'parse_options')
def checked_options(original):
    """Options are not checked at all: a misspelt key is ignored, and the rest fails after folders were renamed.

    utils/options.py:80. The place for everything that has to happen before the first folder is made; see the functions
    called here. Can go when BasicSR checks its options.
    """

    def parse_options(root_path, is_train=True):
        accept_local_rank()
        file, forced = command_line()
        if file is None:  # BasicSR's own message
            return original(root_path, is_train)
        from dpmambair_basicsr.options import apply_forced, check_options, check_root, check_structure, refuse

        raw = read_options(file)
        refuse(file, apply_forced(raw, forced) or check_structure(raw, is_train))
        opt, args = original(root_path, is_train)
        problems = []
        if not args.debug:  # whose runs must not take the place of the real ones: they have a folder of their own
            obey_experiments_root(opt, raw['path'])
            problems = check_root(opt, raw['path'])
        refuse(file, problems + check_options(opt))
        # BasicSR's train.py runs as __main__, so its functions are not reached through the module basicsr.train
        caller = sys._getframe(1).f_globals
        if 'load_resume_state' in caller:
            caller['load_resume_state'] = load_resume_state
        if 'create_train_val_dataloader' in caller:
            caller['create_train_val_dataloader'] = whole_epochs(caller['create_train_val_dataloader'])
        return opt, args

    return parse_options


def accept_local_rank() -> None:
    """`unrecognized arguments: --local-rank`: torch.distributed.launch spells it so since torch 2.0; options.py:88 not.

    Can go when BasicSR accepts it; torchrun passes none.
    """
    sys.argv[:] = [re.sub(r'^--local-rank\b', '--local_rank', argument) for argument in sys.argv]


def read_options(file: str):
    """The option file as BasicSR reads it.

    Raises:
        SystemExit: if it cannot be read, is no text or no YAML, or holds a tag that would call Python, see `safe_yaml`.
    """
    import yaml
    from basicsr.utils import options

    try:
        with open(file) as stream:
            return yaml.load(stream, Loader=options.ordered_yaml()[0])
    except OSError as error:
        raise SystemExit(f'{file}: {error.strerror}') from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SystemExit(f'{file}: {error}') from None


def obey_experiments_root(opt: dict, wanted: dict) -> None:
    """`path.experiments_root` and `path.results_root` of the option file are overwritten, utils/options.py:158, 172.

    Without them a run is found again only from the directory it was started in. A relative one is taken from the
    current directory, `~` is expanded. With `--debug` they are not asked: BasicSR's debug_<name> is used. Can go with
    1.4.2: master obeys them.
    """
    root = 'experiments_root' if opt['is_train'] else 'results_root'
    if wanted.get(root) is None:
        return
    old, new = opt['path'][root], os.path.abspath(os.path.expanduser(wanted[root]))
    for key in (root, 'models', 'training_states', 'log', 'visualization'):
        if key in opt['path']:
            opt['path'][key] = new + opt['path'][key].removeprefix(old)


def load_resume_state(opt: dict) -> dict | None:
    """Resuming needs a GPU (train.py:85), unpickles anything, and `--auto_resume` looks below the current directory.

    train.py:71: from another directory it starts again at 0. A name such as `best.state` stops it, and so does a
    truncated file. Here: the experiment's own directory, the highest number whose state and networks can be read, on
    any device, weights_only. Can go when BasicSR does so.

    Raises:
        SystemExit: if there are states but none can be used, or networks without any: starting from 0 would be a
            surprise. So too if the state that path.resume_state names cannot be used.
    """
    from basicsr.utils import check_resume

    if opt['auto_resume']:
        file = newest_usable_state(opt)
        opt['path']['resume_state'] = None if file is None else str(file)
    file = opt['path'].get('resume_state')
    if not file:
        return None
    try:
        state = read_state(opt, file)
    except ValueError as error:
        raise SystemExit(f'path.resume_state: cannot resume from {error}') from None
    check_resume(opt, state['iter'])
    return state


def newest_usable_state(opt: dict) -> Path | None:
    folder = Path(opt['path']['training_states'])
    files = [file for file in folder.glob('*.state') if file.stem.isdecimal()]
    for file in sorted(files, key=lambda file: int(file.stem), reverse=True):
        try:
            read_state(opt, file)
            return file
        except ValueError as error:
            print(f'Cannot resume from {error}. Trying the one before.', flush=True)
    if files:
        raise SystemExit(f'{folder}: none of its {len(files)} training states can be resumed from')
    networks = {file.stem.rpartition('_')[2] for file in Path(opt['path']['models']).glob('net_g_*.pth')} - {'best'}
    if 'latest' in networks or len(networks) > 1:  # one number may be of a checkpoint that is not complete
        raise SystemExit(
            f'{opt["path"]["models"]} holds networks, but {folder} no training state: without --auto_resume training '
            'starts at iteration 0 and renames the folder of the run'
        )
    if opt.get('rank', 0) == 0:
        print(
            f'WARNING: --auto_resume finds no training state in {folder}: training starts at iteration 0.', flush=True
        )
    return None


def read_state(opt: dict, file) -> dict:
    """A training state, on the CPU, of which every network of the options has its checkpoint beside it.

    Raises:
        ValueError: naming the state, and what of it cannot be read.
    """
    state = read_on_cpu(file)
    if not (isinstance(state, dict) and {'epoch', 'iter', 'optimizers', 'schedulers'} <= state.keys()):
        raise ValueError(f'{file}: is no training state')
    ignored = opt['path'].get('ignore_resume_networks') or ()
    for network in (key for key in opt if key.startswith('network_') and key not in ignored):
        checkpoint = Path(opt['path']['models']) / f'net_{network.removeprefix("network_")}_{state["iter"]}.pth'
        try:
            read_on_cpu(checkpoint)
        except ValueError as error:
            raise ValueError(f'{file}: {error}') from None
    return state


def read_on_cpu(file):
    """What torch.save has written, weights_only; storage is mapped, not read. ValueError, naming the file, if not."""
    import zipfile

    import torch

    try:  # the format before torch 1.6 is no zip file and cannot be mapped
        return torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch.load raises many kinds
        reason = ' '.join(str(error).split()).partition('. ')[0]
        raise ValueError(f'{file}: {type(error).__name__}: {reason}') from None


def whole_epochs(original):
    """Epochs are planned as if incomplete batches were used (train.py:41), but the loader leaves them out.

    Training ends early: 13 images in batches of 8, total_iter 40: after 21. The same happens after `--auto_resume` with
    larger batches. Here: as many epochs as are left to do. Can go when BasicSR divides by len(train_loader).

    Raises:
        ValueError: if there is not a single batch; BasicSR would end at once, without a word.
    """
    if hasattr(original, 'mended_by'):
        return original

    @functools.wraps(original)
    def create_train_val_dataloader(opt, logger):
        from dpmambair_basicsr import training_run
        from dpmambair_basicsr.host_training import check_processes_agree
        from dpmambair_basicsr.option_trial import no_batch

        train_loader, train_sampler, val_loaders, planned, total_iters = original(opt, logger)
        per_epoch = len(train_loader)
        if per_epoch == 0:
            ratio = opt['datasets']['train'].get('dataset_enlarge_ratio', 1)
            message = no_batch(len(train_loader.dataset), train_loader.batch_size, ratio, opt['world_size'])
            raise ValueError(f'datasets.train: {message}')
        if training_run.current is not None:
            training_run.current.val_loaders = val_loaders
        state = opt['path'].get('resume_state')
        state = read_on_cpu(state) if state else {'epoch': 0, 'iter': 0}
        if opt['dist']:
            check_processes_agree(items=len(train_loader.dataset), iterations_done=state['iter'])
        total_epochs = state['epoch'] - (state['iter'] - total_iters) // per_epoch
        if total_epochs != planned:
            logger.info(f'Incomplete batches are left out: {per_epoch} iterations per epoch, {total_epochs} epochs.')
        return train_loader, train_sampler, val_loaders, total_epochs, total_iters

    create_train_val_dataloader.mended_by = __name__
    return create_train_val_dataloader


@replaces('basicsr.utils.options', 'ordered_yaml')
def safe_yaml(original):
    """Option files are read with the unsafe loader, so `!!python/object/apply:os.system` runs; utils/options.py:12, 95.

    Can go when BasicSR uses the safe one.
    """
    import yaml

    class Loader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
        pass

    def ordered_yaml():
        safe, dumper = original()
        ordered = safe.yaml_constructors[yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG]
        Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, ordered)
        return Loader, dumper

    return ordered_yaml


@replaces('basicsr.utils.options', '_postprocess_yml_value')
def forced_value(original):
    """`--force_yml` evaluates lists as Python (utils/options.py:77) and leaves '-1' and '1e-4' as text.

    And none is always no value: here 'none', in quotes, is the word. Can go when BasicSR parses these values.
    """

    def postprocess_yml_value(text):
        import yaml

        from dpmambair_basicsr.option_types import is_number_as_text

        def convert(value):
            if isinstance(value, list):
                return [convert(part) for part in value]
            if not is_number_as_text(value):
                return value
            return int(value) if value.lstrip('+-').isdecimal() else float(value)

        if text.startswith(("'", '"')):
            return yaml.safe_load(text)
        return convert(yaml.safe_load(text) if text.startswith('[') else original(text))

    return postprocess_yml_value


@replaces('basicsr.utils.dist_util', '_init_dist_pytorch')
def init_dist_anywhere(original):
    """torchrun without a GPU: `ZeroDivisionError`, then NCCL; utils/dist_util.py:24. With several nodes: the wrong GPU.

    Can go when BasicSR chooses gloo without CUDA and the device by LOCAL_RANK.
    """

    def init_dist_pytorch(backend, **kwargs):
        import torch

        if torch.cuda.is_available():
            local_rank = int(os.environ.get('LOCAL_RANK', os.environ['RANK']))
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        else:
            backend = 'gloo'
        torch.distributed.init_process_group(backend=backend, **kwargs)

    return init_dist_pytorch


@replaces('basicsr.utils.dist_util', '_init_dist_slurm')
def init_dist_slurm_without_shell(original):
    """SLURM_NODELIST is pasted into a shell command (CVE-2024-27763), utils/dist_util.py:44; needs a GPU too.

    Can go when BasicSR passes an argument list.
    """

    def init_dist_slurm(backend, port=None):
        import subprocess

        from basicsr.utils import dist_util

        command = ['scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST']]
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        os.environ['MASTER_ADDR'] = hosts[0]
        if port is not None:
            os.environ['MASTER_PORT'] = str(port)
        os.environ.setdefault('MASTER_PORT', '29500')
        os.environ['WORLD_SIZE'] = os.environ['SLURM_NTASKS']
        os.environ['RANK'] = os.environ['SLURM_PROCID']
        os.environ['LOCAL_RANK'] = os.environ.get('SLURM_LOCALID', os.environ['SLURM_PROCID'])
        dist_util._init_dist_pytorch(backend)

    return init_dist_slurm


@replaces('basicsr.models.base_model:BaseModel', 'model_to_device')
def model_to_any_device(original):
    """Distributed training without a GPU: DistributedDataParallel is given a CUDA device, models/base_model.py:98.

    Can go when BasicSR passes device_ids only for CUDA.
    """

    def model_to_device(self, net):
        if self.opt['dist'] and self.device.type == 'cpu':
            from torch.nn.parallel import DistributedDataParallel

            unused = self.opt.get('find_unused_parameters', False)
            return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)
        return original(self, net)

    return model_to_device


@replaces('basicsr.models.base_model:BaseModel', 'get_optimizer')
def any_optimizer(original):
    """1.4.2 knows Adam only, models/base_model.py:103; master a few more. The others come from torch.optim.

    Can go when BasicSR looks there.
    """

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        try:
            return original(self, optim_type, params, lr, **kwargs)
        except NotImplementedError:
            from dpmambair_basicsr.option_types import did_you_mean, optimizers

            known = optimizers()
            if optim_type not in known:
                hint = did_you_mean(optim_type, known)
                raise NotImplementedError(f'optimizer {optim_type}: not in torch.optim{hint}') from None
            return known[optim_type](params, lr=lr, **kwargs)

    return get_optimizer


@replaces('basicsr.data', 'worker_init_fn')
def fresh_worker_seeds(original):
    """Every epoch's workers are seeded alike, so crops and flips repeat each epoch; data/__init__.py:97.

    torch gives each worker of each epoch its own seed, drawn from the generator that manual_seed + rank has seeded.
    That is for loaders without BasicSR's sampler: items of the others have their own, see `data/item_seeds.py`. Can go
    when BasicSR seeds from it, or leaves it to torch.
    """

    def worker_init_fn(worker_id, num_workers, rank, seed):
        import random

        import numpy as np
        import torch

        from dpmambair_basicsr import interruption

        interruption.leave_to_parent()
        worker_seed = (torch.initial_seed() + rank) % 2**32
        random.seed(worker_seed)
        np.random.seed(worker_seed)

    return worker_init_fn


@replaces('basicsr.data.prefetch_dataloader:PrefetchGenerator', 'run')
def pass_on_errors(original):
    """`prefetch_mode: cpu` and an image that cannot be read: training hangs for ever; data/prefetch_dataloader.py:25.

    The thread dies without a word. Here it puts the error into the queue, and `raise_errors` raises it. Can go when
    BasicSR passes errors on.
    """

    def run(self):
        try:
            original(self)
        except Exception as error:
            self.queue.put(error)

    return run


@replaces('basicsr.data.prefetch_dataloader:PrefetchGenerator', '__next__')
def raise_errors(original):
    """Other half of `pass_on_errors`."""

    def next_item(self):
        item = original(self)
        if isinstance(item, Exception):
            raise item
        return item

    return next_item


@replaces('basicsr.data.degradations', 'add_jpg_compression')
def integer_jpeg_quality(original):
    """A float quality, as random_add_jpg_compression draws: OpenCV >= 4.5.4 refuses it; data/degradations.py:745.

    Can go when BasicSR rounds it.
    """

    def add_jpg_compression(img, quality=90):
        return original(img, round(quality))

    return add_jpg_compression


@replaces('basicsr.metrics.niqe', 'niqe')
def niqe_large_enough(original):
    """`SVD did not converge` for an image of one 96 x 96 block: a covariance of one sample; metrics/niqe.py:131.

    Can go when BasicSR says so itself.
    """

    def niqe(img, *args, block_size_h=96, block_size_w=96, **kwargs):
        blocks = (img.shape[0] // block_size_h) * (img.shape[1] // block_size_w)
        if blocks < 2:
            size = f'{img.shape[0]} x {img.shape[1]}'
            raise ValueError(f'NIQE needs two blocks of {block_size_h} x {block_size_w} pixels, the image has {size}')
        return original(img, *args, block_size_h=block_size_h, block_size_w=block_size_w, **kwargs)

    return niqe
