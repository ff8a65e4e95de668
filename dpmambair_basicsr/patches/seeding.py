"""Patches that make loading depend only on the seed and the position of an item, so that it can be resumed."""

from typing import Any

import torch
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.utils import get_root_logger

from dpmambair_basicsr.data.item_seeds import SeededIndex, SeededItems
from dpmambair_basicsr.data.progressive import accompany
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.training import run as training_run
from dpmambair_basicsr.training import signals as interruption


@replaces('basicsr.data', 'build_dataloader')
def known_run(original):
    """Makes an item's randomness depend only on the seed and its position: the sampler provides it, loading applies it.

    Fixes: with `build_dataloader` it depends on what was loaded before, and by which worker.
    Remove once: BasicSR seeds each item.
    """

    def build_dataloader(dataset, dataset_opt, num_gpu=1, dist=False, sampler: Any = None, seed=None):
        if dataset_opt['phase'] == 'train' and not hasattr(dataset, '__getitems__'):
            dataset = SeededItems(dataset)
        accum_iter = dataset_opt.get('accum_iter', 1)
        if accum_iter > 1:  # micro-batches, see models.gradient_accumulation
            dataset_opt = {**dataset_opt, 'batch_size_per_gpu': accum_iter * dataset_opt['batch_size_per_gpu']}
        loader = original(dataset, dataset_opt, num_gpu=num_gpu, dist=dist, sampler=sampler, seed=seed)
        if loader.worker_init_fn is not None:
            start_workers_unsignalled(loader)
        if isinstance(sampler, EnlargedSampler):
            seeds: list[Any] = [seed]
            if dist:  # without manual_seed, each process has drawn its own
                torch.distributed.broadcast_object_list(seeds, src=0)
            run = training_run.TrainingRun(seeds[0], loader.batch_size * sampler.num_replicas)
            sampler.run = training_run.current = run
            interruption.forget()
            if dataset_opt.get('prefetch_mode') == 'cpu' and loader.num_workers == 0:
                get_root_logger().warning(
                    'prefetch_mode cpu without workers: images are loaded alongside the training and share its random '
                    'numbers, so two runs differ. With num_worker_per_gpu: 1 they are equal.'
                )
        return loader

    return build_dataloader


def start_workers_unsignalled(loader) -> None:
    """Block signals while workers start: before `leave_to_parent`, one would end the worker, and so the training."""
    start = loader._get_iterator

    def get_iterator():
        with interruption.withheld():
            return start()

    loader._get_iterator = get_iterator


@replaces('basicsr.data.data_sampler:EnlargedSampler', 'set_epoch')
def known_epoch(original):
    """Tells the training which epoch begins.

    Fixes: only `EnlargedSampler.set_epoch` knows the epoch of the loop, and `seeded_order` needs it.
    Remove once: `seeded_order` is removed.
    """

    def set_epoch(self, epoch):
        original(self, epoch)
        if hasattr(self, 'run'):
            self.run.begin_epoch(epoch)

    return set_epoch


@replaces('basicsr.data.data_sampler:EnlargedSampler', '__iter__')
def seeded_order(original):
    """Skips the items used by an interrupted epoch; provides each item's seed, and its place in progressive training.

    Fixes: an interrupted epoch starts over after `--auto_resume` (`EnlargedSampler.__iter__`): its first images are
        seen twice.
    Remove once: BasicSR's sampler has a state.
    """

    def indices(self):
        order = list(original(self))
        if hasattr(self, 'run'):
            seed, processes = self.run.seed, self.num_replicas
            order = [
                SeededIndex(index, 'item', seed, self.epoch, place * processes + self.rank)
                for place, index in enumerate(order)
            ]
            order = order[-(-self.run.items_used_before(self.epoch) // processes) :]
        return accompany(self.dataset, order, done=self.run.iteration if hasattr(self, 'run') else None)

    return indices
