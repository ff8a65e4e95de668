"""Progressive training as in Restormer (Zamir et al. 2022, Sec. 3.3): crops grow while batches shrink, phase by phase.

Restormer's loader always loads batch_size_per_gpu crops of the last phase's size, and its model discards what the phase
does not use. Here the dataset is asked for whole batches (`__getitems__`) and loads only what is used.

The phase follows the training iteration. BasicSR's sampler runs in the training process and its indices reach the
loader's workers, so the sampler passes it on (see `patches/seeding`): each index of a progressive dataset comes with
its position in the rest of the epoch, and with the number of iterations before that. This is independent of epochs,
workers, prefetching, and resuming.
"""

import copy
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from dpmambair_basicsr.data.item_seeds import item

NO_ITERATION = (
    'progressive: the phase follows the training iteration, which only a loader of basicsr.data.build_dataloader with '
    "BasicSR's EnlargedSampler knows, built after the dataset; use these, or remove progressive"
)


@dataclass(frozen=True)
class Phases:
    """The option `progressive` of a training set: three lists of equal length.

    Args:
        gt_sizes: crop size in GT pixels, shared by the crops of a batch, at most gt_size.
        batch_sizes: per GPU, at most batch_size_per_gpu.
        iters: length in iterations. The last phase lasts as long as training does.
    """

    gt_sizes: list[int]
    batch_sizes: list[int]
    iters: list[int]

    def at(self, iteration: int) -> tuple[int, int]:
        """(crop size, batch size per GPU) of a training iteration, which count from 1 as in BasicSR."""
        phase = bisect_left(list(accumulate(self.iters))[:-1], iteration)
        return self.gt_sizes[phase], self.batch_sizes[phase]


def read_phases(opt: dict) -> Phases | None:
    """The phases of a dataset with these options, None if it has none (or is not for training).

    Raises:
        ValueError: naming the key.
    """
    if opt.get('progressive') is None or opt['phase'] != 'train':
        return None
    keys = ('gt_sizes', 'batch_sizes', 'iters')
    given = opt['progressive']
    if not isinstance(given, dict) or sorted(given) != sorted(keys):
        raise ValueError(f'progressive: must have the keys {", ".join(keys)}, got {given!r}')
    for key in keys:
        values = given[key]
        if not isinstance(values, list) or not values or not all(type(v) is int and v > 0 for v in values):
            raise ValueError(f'progressive.{key}: expected a list of positive ints, got {values!r}')
        if len(values) != len(given['gt_sizes']):
            raise ValueError(f'progressive.{key}: has {len(values)} entries, gt_sizes has {len(given["gt_sizes"])}')
    multiple = 8 * opt.get('scale', 1)
    for size in given['gt_sizes']:
        if size % multiple:
            raise ValueError(f'progressive.gt_sizes: {size} is not a multiple of {multiple} (8 x scale)')
    if 'gt_size' not in opt:
        raise ValueError(f'gt_size: missing beside progressive, should be the largest of gt_sizes {given["gt_sizes"]}')
    if max(given['gt_sizes']) != opt['gt_size']:
        raise ValueError(f'gt_size: {opt["gt_size"]} is not the largest of progressive.gt_sizes {given["gt_sizes"]}')
    if 'batch_size_per_gpu' not in opt:
        raise ValueError('progressive: belongs in the training set, not in a part of it')
    for size in given['batch_sizes']:
        if size > opt['batch_size_per_gpu']:
            raise ValueError(
                f'progressive.batch_sizes: {size} is more than batch_size_per_gpu {opt["batch_size_per_gpu"]}'
            )
    return Phases(**given)


def compare_lengths(opt: dict) -> str:
    """Warning if phases and total_iter disagree; '' if they agree."""
    given = opt['datasets']['train'].get('progressive')
    total, planned = int(opt['train']['total_iter']), sum(given['iters']) if given else 0
    if not given or planned == total:
        return ''
    last = Phases(**given).at(total)
    consequence = f'training ends in the phase of gt_size {last[0]}, batch size {last[1]}'
    if total > planned:
        consequence = (
            f'the last phase (gt_size {last[0]}, batch size {last[1]}) lasts {total - planned} iterations longer'
        )
    return f'datasets.train.progressive.iters sum to {planned}, train.total_iter is {total}: {consequence}.'


class Draw(NamedTuple):
    """Index passed by the sampler to a progressive dataset."""

    index: int
    position: int  # in what is left of this epoch's order
    done: int  # training iterations before position 0


class ProgressiveBatches:
    """Mix-in for datasets with `opt` and `__getitem__`; the constructor must call `start_progressive`."""

    opt: dict

    def start_progressive(self) -> None:
        """Reads the option `progressive`; if None, batches are as the loader requests."""
        self.phases = read_phases(self.opt)

    def __getitems__(self, draws: list) -> list[dict]:
        """The items of a batch, fewer than requested in phases of smaller batches.

        The selection is random and differs between epochs, like the sampler's order.

        Raises:
            RuntimeError: `progressive` with another sampler than BasicSR's.
        """
        if self.phases is None:
            return [item(self, index) for index in draws]
        first = draws[0]
        if not isinstance(first, Draw):
            raise RuntimeError(NO_ITERATION)
        gt_size, batch_size = self.phases.at(first.done + first.position // len(draws) + 1)
        # Without a distributed launcher the loader's batch is for all GPUs.
        used = batch_size * len(draws) // self.opt['batch_size_per_gpu']
        view = with_gt_size(self, gt_size)
        return [item(view, draw.index) for draw in draws[:used]]


def with_gt_size(dataset, gt_size: int):
    """A copy of the dataset with another crop size; a prefetching thread may be using the original.

    Everything else is shared, including open files.
    """
    view = copy.copy(dataset)
    view.opt = {**dataset.opt, 'gt_size': gt_size}
    if hasattr(dataset, 'datasets'):
        view.datasets = [with_gt_size(part, gt_size) for part in dataset.datasets]
    return view


def accompany(dataset, indices: Iterable[int], done: int | None) -> Iterator[int | Draw]:
    """Replaces the indices that BasicSR's sampler yields by a Draw each, for a progressive dataset.

    Args:
        done: training iterations so far; None if the sampler does not know.

    Raises:
        RuntimeError: a progressive dataset, and the sampler does not know.
    """
    if getattr(dataset, 'phases', None) is None:
        return iter(indices)
    if done is None:
        raise RuntimeError(NO_ITERATION)
    return (Draw(index, position, done) for position, index in enumerate(indices))
