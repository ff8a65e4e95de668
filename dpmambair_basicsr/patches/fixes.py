"""Patches of single functions of BasicSR that fail on current libraries, or without a word."""

import torch

from dpmambair_basicsr.files.image_folders import check_inside
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.training import signals as interruption


@replaces('basicsr.models.base_model:BaseModel', 'get_optimizer')
def any_optimizer(original):
    """1.4.2 knows Adam only, models/base_model.py:103; master a few more. The others come from torch.optim.

    Can go when BasicSR looks there.
    """

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        try:
            return original(self, optim_type, params, lr, **kwargs)
        except NotImplementedError:
            from dpmambair_basicsr.registry import did_you_mean, optimizers

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
    That is for loaders without BasicSR's sampler: items of the others have their own, see `data/item_seeds`. Can go
    when BasicSR seeds from it, or leaves it to torch.
    """

    def worker_init_fn(worker_id, num_workers, rank, seed):
        import random

        import numpy as np

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


@replaces('basicsr.data', 'build_dataset')
def paths_inside_their_folder(original):
    """A list of images (meta_info) can name any file of the machine; data/data_util.py:189, realesrgan_dataset.py:58.

    Our data sets check it themselves. Can go when BasicSR's do.
    """

    def build_dataset(dataset_opt):
        dataset = original(dataset_opt)
        on_disk = (dataset_opt.get('io_backend') or {}).get('type', 'disk') == 'disk'
        if on_disk and type(dataset).__module__.startswith('basicsr.'):
            only = 'gt' if 'dataroot_gt' in dataset_opt else 'lq'  # whose paths are not named
            for role in ('lq', 'gt'):
                folder = dataset_opt.get(f'dataroot_{role}')
                paths = [
                    path.get(f'{role}_path') if isinstance(path, dict) else path
                    for path in getattr(dataset, 'paths', ())
                    if isinstance(path, dict) or role == only
                ]
                if isinstance(folder, str):
                    check_inside(folder, filter(None, paths))
        return dataset

    return build_dataset
