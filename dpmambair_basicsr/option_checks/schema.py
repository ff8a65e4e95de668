"""The keys that BasicSR reads in each section of an option file, their limits, and which of them are required."""

import math
import re

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
