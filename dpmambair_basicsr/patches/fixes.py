"""Patches of single functions of BasicSR that fail on current libraries, or fail silently."""

import torch

from dpmambair_basicsr.data.basicsr_datasets import paths_by_folder
from dpmambair_basicsr.files.image_folders import check_inside, some
from dpmambair_basicsr.files.image_lists import missing_files
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.training import signals as interruption


@replaces('basicsr.models.base_model:BaseModel', 'get_optimizer')
def any_optimizer(original):
    """Supports any optimizer of torch.optim, and those of other packages by dotted name.

    Fixes: `BaseModel.get_optimizer` of 1.4.2 supports only Adam, master a few more.
    Remove once: BasicSR looks in torch.optim.
    """

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        try:
            return original(self, optim_type, params, lr, **kwargs)
        except NotImplementedError:
            from dpmambair_basicsr.registry import find_optimizer

            target, problems = find_optimizer('optimizer', optim_type)
            if target is None:
                raise NotImplementedError(problems[0]) from None
            return target(params, lr=lr, **kwargs)

    return get_optimizer


@replaces('basicsr.data', 'worker_init_fn')
def fresh_worker_seeds(original):
    """Seeds a loader's worker from torch's seed, which changes every epoch and depends on manual_seed and rank.

    For loaders without BasicSR's sampler; with it, items have their own seeds, see `data/item_seeds`.

    Fixes: `worker_init_fn` seeds the workers identically in every epoch, so crops and flips repeat.
    Remove once: BasicSR seeds from torch's, or leaves it to torch.
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
    """Puts an error of the prefetching thread into its queue; `raise_errors` raises it.

    Fixes: with `prefetch_mode: cpu` and an unreadable image, the thread of `PrefetchGenerator` dies silently, and
        training hangs forever.
    Remove once: BasicSR passes errors on.
    """

    def run(self):
        try:
            original(self)
        except Exception as error:
            self.queue.put(error)

    return run


@replaces('basicsr.data.prefetch_dataloader:PrefetchGenerator', '__next__')
def raise_errors(original):
    """Raises the error that `pass_on_errors` has put into the queue.

    Fixes: see `pass_on_errors`; this is its other half, `PrefetchGenerator.__next__`.
    Remove once: `pass_on_errors` is removed.
    """

    def next_item(self):
        item = original(self)
        if isinstance(item, Exception):
            raise item
        return item

    return next_item


@replaces('basicsr.data.degradations', 'add_jpg_compression')
def integer_jpeg_quality(original):
    """Rounds the quality of JPEG.

    Fixes: `random_add_jpg_compression` draws a float, which OpenCV rejects from 4.5.4 on.
    Remove once: BasicSR rounds it.
    """

    def add_jpg_compression(img, quality=90):
        return original(img, round(quality))

    return add_jpg_compression


@replaces('basicsr.metrics.niqe', 'niqe')
def niqe_large_enough(original):
    """Reports the minimum image size of NIQE.

    Fixes: `niqe` fails with `SVD did not converge` for an image of one block: a covariance of one sample.
    Remove once: BasicSR says so itself.
    """

    def niqe(img, *args, block_size_h=96, block_size_w=96, **kwargs):
        blocks = (img.shape[0] // block_size_h) * (img.shape[1] // block_size_w)
        if blocks < 2:
            size = f'{img.shape[0]} x {img.shape[1]}'
            raise ValueError(f'NIQE needs two blocks of {block_size_h} x {block_size_w} pixels, the image has {size}')
        return original(img, *args, block_size_h=block_size_h, block_size_w=block_size_w, **kwargs)

    return niqe


def paths_inside_their_folder(original):
    """Rejects an image list with files outside the folder of the images.

    Fixes: a list (meta_info) can name any file on the machine, in `paired_paths_from_meta_info_file` and
        `RealESRGANDataset`. Missing files are silently skipped in a folder's listing, or replaced by another image
        (RealESRGANDataset); here they are logged. Our datasets check this themselves.
    Remove once: BasicSR's datasets do.
    """

    def build_dataset(dataset_opt):
        from basicsr.utils import get_root_logger

        dataset = original(dataset_opt)
        for folder, paths in paths_by_folder(dataset, dataset_opt):
            check_inside(folder, paths)
            if missing := missing_files(folder, paths):
                get_root_logger().warning(f'{folder}: {some(missing)} cannot be read: broken links or missing files.')
        return dataset

    return build_dataset
