"""Table of all keys that BasicSR (1.4.2 and master) reads in an option file; see `files.option_row.Option`.

Our models and datasets declare their additional keys as rows of the same form, in `option_keys`.
"""

from typing import Literal

from dpmambair_basicsr.files.option_row import TEST, TRAIN, Option
from dpmambair_basicsr.ops.selective_scan.backend import BACKENDS, RENAMED

ALWAYS = (TRAIN, TEST)
# Ours, but read whatever the model is.
SCAN_BACKEND = Option(
    '',
    'scan_backend',
    Literal[(*BACKENDS, *RENAMED)] | None,
    'of selective scans; ~: the best available; triton, of earlier versions, is cuda',
)

OPTIONS = (
    Option('', 'name', str, 'name of the run and of its folder in experiments/ or results/', required=ALWAYS),
    Option('', 'model_type', str, 'class of the model', required=ALWAYS),
    Option('', 'num_gpu', int | Literal['auto'], 'number of GPUs; 0: CPU; auto: all available', low=0, required=ALWAYS),
    Option('', 'scale', int, 'size of the clean images relative to the degraded', low=1),
    Option('', 'manual_seed', int | None, 'random seed; default: random'),
    Option('', 'datasets', dict, 'train, val, val_<name>; in testing also test_<name>', required=ALWAYS),
    Option('', 'network_g', dict, 'restoration network', required=ALWAYS, calls='ARCH'),
    Option('', 'path', dict, 'checkpoints to start from, output folders', required=ALWAYS),
    Option('', 'train', dict, 'losses, optimizers, schedules', required=(TRAIN,)),
    Option('', 'val', dict | None, 'validation and testing', required=(TEST,)),
    Option('', 'logger', dict, 'logging and checkpoint frequencies', required=(TRAIN,)),
    Option('', 'max_pixels', int, 'larger images are refused before decoding; default 2^28; ours', low=1),
    Option('', 'dist_params', dict | None, 'options of torch.distributed'),
    Option('', 'find_unused_parameters', bool | None, 'option of DistributedDataParallel'),
    SCAN_BACKEND,
    Option('train', 'total_iter', float, 'number of training iterations', low=1, required=(TRAIN,)),
    Option('train', 'warmup_iter', float, 'iterations of linear learning-rate warm-up from 0; -1: none', low=-1),
    Option('train', 'ema_decay', float, 'decay of the EMA of the network, params_ema; 0: no EMA', low=0, high=1),
    Option('train', 'scheduler', dict, 'learning-rate scheduler', required=(TRAIN,), calls='scheduler'),
    Option(
        'train',
        'optim_g',
        dict,
        'optimizer of network_g; from another package: package.Class',
        required=(TRAIN,),
        calls='optimizer',
    ),
    Option('train', '*_opt', dict | None, 'a loss', calls='LOSS'),
    Option('val', 'val_freq', float, 'iterations between validations', low=1, required=(TRAIN,)),
    Option('val', 'save_img', bool | None, 'save the restored images', required=ALWAYS),
    Option('val', 'suffix', str | int | float | None, 'suffix of the names of restored images; ~: the name of the run'),
    Option('val', 'metrics', dict | None, 'name: metric', calls='METRIC'),
    Option('val', 'pbar', bool | None, 'show a progress bar'),
    Option('path', 'pretrain_network_*', str | None, 'checkpoint to start from, or to test'),
    Option('path', 'strict_load_*', bool, 'require every parameter in the checkpoint; default true'),
    Option('path', 'param_key_*', str | None, 'params or params_ema; ~: the file is a bare state dict'),
    Option('path', 'resume_state', str | None, 'training state to resume from'),
    Option('path', 'ignore_resume_networks', list[str] | str | None, 'networks that are not loaded on resume'),
    Option('path', 'experiments_root', str | None, 'training folder; default: experiments/<name>'),
    Option('path', 'results_root', str | None, 'test folder; default: results/<name>'),
    Option('logger', 'print_freq', float, 'iterations between log lines', low=1, required=(TRAIN,)),
    Option('logger', 'save_checkpoint_freq', float, 'iterations between checkpoints', low=1, required=(TRAIN,)),
    Option('logger', 'use_tb_logger', bool | None, 'write TensorBoard logs', required=(TRAIN,)),
    Option('logger', 'wandb', dict | None, 'Weights & Biases'),
    Option('logger.wandb', 'project', str | None, 'project name; ~: wandb is not used'),
    Option('logger.wandb', 'resume_id', str | None, 'id of the wandb run to continue'),
    Option('dist_params', 'backend', str, 'communication backend, e.g. nccl'),
    Option('dist_params', 'port', int | None, 'port of the first process, with slurm', low=0),
    Option('dist_params', 'timeout', float, 'process group timeout of torch, in seconds', low=1),
    Option('datasets', 'name', str, 'name in logs and results', required=ALWAYS),
    Option('datasets', 'type', str, 'class of the dataset', required=ALWAYS),
    Option('datasets', 'scale', int, 'as at the top level of the file', low=1),
    Option('datasets', 'io_backend', dict | None, 'disk or lmdb; default: disk'),
    Option('datasets', 'batch_size_per_gpu', int, 'crops per iteration and GPU', low=1, required=(TRAIN,)),
    Option('datasets', 'num_worker_per_gpu', int, 'worker processes that load images', low=0, required=(TRAIN,)),
    Option('datasets', 'dataset_enlarge_ratio', float, 'passes over the images per epoch', low=0),
    Option('datasets', 'prefetch_mode', Literal['cpu', 'cuda'] | None, 'where batches are prefetched'),
    Option('datasets', 'num_prefetch_queue', int, 'number of batches prefetched by cpu', low=1),
    Option('datasets', 'pin_memory', bool | None, 'required by prefetch_mode cuda'),
    Option('datasets', 'persistent_workers', bool | None, 'keep the worker processes between epochs'),
    Option('datasets', 'use_shuffle', bool | None, 'no effect: BasicSR always shuffles'),
)

# Added or overwritten by parse_options: known keys, but not allowed in option files.
SET_BY_BASICSR = {
    '': frozenset({'dist', 'rank', 'world_size', 'auto_resume', 'is_train', 'root_path'}),
    'path': frozenset({'models', 'training_states', 'log', 'visualization'}),
    'datasets': frozenset({'phase'}),
}
# Rejected by our datasets with an explanation; valid for BasicSR's.
REFUSED_LATER = frozenset({'mean', 'std', 'color'})

FILES = ('dataroot', 'meta_info')  # prefixes of dataset keys that name files or folders


def rows_of(model: type) -> tuple[Option, ...]:
    """The rows of a model: BasicSR's, its own, and those of its base classes."""
    return (*OPTIONS, *(row for base in model.__mro__ for row in vars(base).get('option_keys', ())))
