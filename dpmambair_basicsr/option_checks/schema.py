"""The one table of the keys that BasicSR (1.4.2 and master) reads in an option file; see `files.option_row.Option`.

What our models and datasets read beside them, those declare in rows of the same shape: `option_keys`.
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
    Option('', 'name', str, 'of the run, and of its folder in experiments/ or results/', required=ALWAYS),
    Option('', 'model_type', str, 'the class that trains and tests', required=ALWAYS),
    Option('', 'num_gpu', int | Literal['auto'], '0: the CPU; auto: all GPUs there are', low=0, required=ALWAYS),
    Option('', 'scale', int, 'of the clean images to the degraded', low=1),
    Option('', 'manual_seed', int | None, 'of all random numbers; default: drawn'),
    Option('', 'datasets', dict, 'train, val, val_<name>; in testing test_<name> too', required=ALWAYS),
    Option('', 'network_g', dict, 'the network that restores', required=ALWAYS, calls='ARCH'),
    Option('', 'path', dict, 'checkpoints to start from, folders of results', required=ALWAYS),
    Option('', 'train', dict, 'losses, optimizers, schedules', required=(TRAIN,)),
    Option('', 'val', dict | None, 'validation and testing', required=(TEST,)),
    Option('', 'logger', dict, 'what is printed and saved how often', required=(TRAIN,)),
    Option('', 'max_pixels', int, 'larger images are refused before they are decoded; default 2^28; ours', low=1),
    Option('', 'dist_params', dict | None, 'of torch.distributed'),
    Option('', 'find_unused_parameters', bool | None, 'of DistributedDataParallel'),
    SCAN_BACKEND,
    Option('train', 'total_iter', float, 'iterations of the training', low=1, required=(TRAIN,)),
    Option('train', 'warmup_iter', float, 'iterations in which the learning rate grows from 0; -1: none', low=-1),
    Option('train', 'ema_decay', float, 'of the average of the network, params_ema; 0: none', low=0, high=1),
    Option('train', 'scheduler', dict, 'of the learning rate', required=(TRAIN,), calls='scheduler'),
    Option(
        'train',
        'optim_g',
        dict,
        'optimizer of network_g; of another package: package.Class',
        required=(TRAIN,),
        calls='optimizer',
    ),
    Option('train', '*_opt', dict | None, 'a loss', calls='LOSS'),
    Option('val', 'val_freq', float, 'iterations from one validation to the next', low=1, required=(TRAIN,)),
    Option('val', 'save_img', bool | None, 'keep the restored images', required=ALWAYS),
    Option('val', 'suffix', str | int | float | None, 'of the names of restored images; ~: the name of the run'),
    Option('val', 'metrics', dict | None, 'name: metric', calls='METRIC'),
    Option('val', 'pbar', bool | None, 'a progress bar'),
    Option('path', 'pretrain_network_*', str | None, 'checkpoint to start from, or to test'),
    Option('path', 'strict_load_*', bool, 'every parameter must be in the checkpoint; default true'),
    Option('path', 'param_key_*', str | None, 'params or params_ema; ~: the file is a bare state dict'),
    Option('path', 'resume_state', str | None, 'training state to resume from'),
    Option('path', 'ignore_resume_networks', list[str] | str | None, 'networks that a resume does not read'),
    Option('path', 'experiments_root', str | None, 'folder of the training; default: experiments/<name>'),
    Option('path', 'results_root', str | None, 'folder of the test; default: results/<name>'),
    Option('logger', 'print_freq', float, 'iterations from one line of the log to the next', low=1, required=(TRAIN,)),
    Option('logger', 'save_checkpoint_freq', float, 'iterations between checkpoints', low=1, required=(TRAIN,)),
    Option('logger', 'use_tb_logger', bool | None, 'write TensorBoard logs', required=(TRAIN,)),
    Option('logger', 'wandb', dict | None, 'Weights & Biases'),
    Option('logger.wandb', 'project', str | None, '~: not used'),
    Option('logger.wandb', 'resume_id', str | None, 'of the run to continue'),
    Option('dist_params', 'backend', str, 'nccl'),
    Option('dist_params', 'port', int | None, 'of the first process, with slurm', low=0),
    Option('dist_params', 'timeout', float, 'seconds that a process waits for the others, as torch has it', low=1),
    Option('datasets', 'name', str, 'in logs and results', required=ALWAYS),
    Option('datasets', 'type', str, 'the class', required=ALWAYS),
    Option('datasets', 'scale', int, 'as at the top of the file', low=1),
    Option('datasets', 'io_backend', dict | None, 'disk or lmdb; default: disk'),
    Option('datasets', 'batch_size_per_gpu', int, 'crops per iteration and GPU', low=1, required=(TRAIN,)),
    Option('datasets', 'num_worker_per_gpu', int, 'processes that load images', low=0, required=(TRAIN,)),
    Option('datasets', 'dataset_enlarge_ratio', float, 'times that an epoch goes through the images', low=0),
    Option('datasets', 'prefetch_mode', Literal['cpu', 'cuda'] | None, 'batches made in advance'),
    Option('datasets', 'num_prefetch_queue', int, 'batches made in advance by cpu', low=1),
    Option('datasets', 'pin_memory', bool | None, 'needed by prefetch_mode cuda'),
    Option('datasets', 'persistent_workers', bool | None, 'keep the processes from epoch to epoch'),
    Option('datasets', 'use_shuffle', bool | None, 'BasicSR shuffles always'),
)

# What parse_options adds, and what it overwrites: known, but not for option files.
SET_BY_BASICSR = {
    '': frozenset({'dist', 'rank', 'world_size', 'auto_resume', 'is_train', 'root_path'}),
    'path': frozenset({'models', 'training_states', 'log', 'visualization'}),
    'datasets': frozenset({'phase'}),
}
# Our datasets refuse them, saying why; BasicSR's have them.
REFUSED_LATER = frozenset({'mean', 'std', 'color'})

FILES = ('dataroot', 'meta_info')  # keys of datasets that begin so name files or folders


def rows_of(model: type) -> tuple[Option, ...]:
    """The rows of a model: BasicSR's, its own, and those of its base classes."""
    return (*OPTIONS, *(row for base in model.__mro__ for row in vars(base).get('option_keys', ())))
