import difflib
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from dpmambair_basicsr.data.dataset_options import CROPS, SEED, TEMPLATE
from dpmambair_basicsr.data.degradations import DEGRADATIONS
from dpmambair_basicsr.data.paired_degradation_dataset import PairedDegradationDataset
from dpmambair_basicsr.data.progressive import ProgressiveBatches
from dpmambair_basicsr.data.synthetic_degradation_dataset import SyntheticDegradationDataset
from dpmambair_basicsr.files.option_row import Option, names
from dpmambair_basicsr.registry import DATASET_REGISTRY

INHERITED = names(CROPS) - {'progressive'} | {'phase', 'scale', 'io_backend', 'filename_tmpl', 'seed'}
SUB_DATASETS = {cls.__name__: cls for cls in (PairedDegradationDataset, SyntheticDegradationDataset)}


@DATASET_REGISTRY.register()
class MixedDegradationDataset(ProgressiveBatches, Dataset):
    """Combines several folders, e.g. one per degradation, into one training (or validation) set.

    Its items are those of the sub-datasets. They have a `label` only if all sub-datasets provide one; networks that
    need none can be trained with any folders.

    An epoch has as many items as the sub-datasets together. The paper does not say how it mixes its seven tasks; here:
        concat: every image once per epoch.
        uniform, or {name: weight}: the items of an epoch are divided among the sub-datasets in exactly these
            proportions (to whole items); each is a random image of its sub-dataset (Python's `random`).

    Outside training only concat is allowed, and `lq_path` has the sub-dataset's name prepended to the file's: BasicSR
    names its output after it, and two sub-datasets may have images of the same name.

    Options:
        datasets: {name: options}. `type` is PairedDegradationDataset (default) or SyntheticDegradationDataset; phase,
            scale, io_backend, gt_size, flips, pad_small, filename_tmpl and seed come from the mixed set unless given; a
            paired set's `degradation` is its name, if that is one, unless given.
        progressive: as PairedDegradationDataset's, for the whole set.
        sampling: 'concat' (default), 'uniform', or positive weights for all names.

    Raises:
        ValueError: unknown key, type, sampling or name.
    """

    option_keys = (
        *CROPS,
        Option('datasets', 'datasets', dict, 'the parts, by degradation or any other name'),
        Option('datasets', 'sampling', str | dict, 'concat, uniform, or weights by name'),
        TEMPLATE,
        SEED,
    )

    def __init__(self, opt):
        self.opt = opt
        if not isinstance(opt.get('datasets'), dict) or not opt['datasets']:
            raise ValueError(f'datasets must map names to options, got {opt.get("datasets")!r}')
        self.names = list(opt['datasets'])
        self.datasets = [self._build(name, dict(sub or {})) for name, sub in opt['datasets'].items()]

        sizes = [len(dataset) for dataset in self.datasets]
        weights = self._weights(opt.get('sampling', 'concat'))
        self.at_random = weights is not None
        draws = sizes if weights is None else apportion(sum(sizes), weights)
        self._ends = np.cumsum(draws)
        share = ', '.join(
            f'{name} {size} images, {count / sum(sizes):.1%} of draws'
            for name, size, count in zip(self.names, sizes, draws, strict=True)
        )
        self.start_progressive()
        # Not get_root_logger, which would open BasicSR's log without its file if it is not open yet.
        name = opt.get('name', 'MixedDegradationDataset')
        logging.getLogger('basicsr').info(f'{name}: {sum(sizes)} items per epoch: {share}.')
        if not self.has_labels:
            logging.getLogger('basicsr').info(f'{name}: no labels; not of a known degradation: {self.unlabelled()}.')

    @property
    def has_labels(self) -> bool:
        return all(getattr(dataset, 'has_labels', True) for dataset in self.datasets)

    @property
    def labels(self) -> set[int]:
        return set().union(*(getattr(dataset, 'labels', set()) for dataset in self.datasets))

    def unlabelled(self) -> str:
        """The sub-datasets without labels, as text, with suggestions for misspelt names."""
        parts = zip(self.names, self.datasets, strict=True)
        found = [str(name) for name, dataset in parts if not getattr(dataset, 'has_labels', True)]
        near = {name: difflib.get_close_matches(name, DEGRADATIONS, n=1) for name in found}
        return ', '.join(f'{name} (did you mean {near[name][0]}?)' if near[name] else name for name in found)

    def _build(self, name, sub):
        kind = sub.setdefault('type', 'PairedDegradationDataset')
        if kind not in SUB_DATASETS:
            raise ValueError(f'datasets, {name}: type must be one of {", ".join(SUB_DATASETS)}, got {kind!r}')
        accepted = names(SUB_DATASETS[kind].option_keys) - {'progressive'}
        for key in sub:
            if key not in accepted | {'type', 'name', 'scale', 'io_backend'}:
                raise ValueError(f'datasets, {name}: unknown key {key!r}, choose from {", ".join(sorted(accepted))}')
        inherited = {key: self.opt[key] for key in INHERITED if key in self.opt}
        options = {**inherited, 'name': name, **sub}
        if 'degradation' in accepted and name in DEGRADATIONS:
            options.setdefault('degradation', name)
        return SUB_DATASETS[kind](options)

    def _weights(self, sampling):
        if sampling == 'concat':
            return None
        if self.opt['phase'] != 'train':
            raise ValueError(f'sampling must be concat outside training, got {sampling!r}')
        if sampling == 'uniform':
            return [1] * len(self.names)
        if not isinstance(sampling, dict):
            raise ValueError(f'sampling must be concat, uniform or weights by name, got {sampling!r}')
        if set(sampling) != set(self.names):
            raise ValueError(f'sampling must weigh {", ".join(self.names)}, got {", ".join(map(str, sampling))}')
        for name, weight in sampling.items():
            if not isinstance(weight, int | float) or not 0 < weight < float('inf'):
                raise ValueError(f'sampling, {name}: the weight must be positive, got {weight!r}')
        return [sampling[name] for name in self.names]

    def __len__(self):
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """The sub-dataset of item `index`, and the index in this dataset of its first item."""
        task = int(np.searchsorted(self._ends, index, side='right'))
        return task, int(self._ends[task - 1]) if task else 0

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f'item {index} of {len(self)}')
        task, start = self.locate(index)
        dataset = self.datasets[task]
        item = dataset[random.randrange(len(dataset)) if self.at_random else index - start]
        if not self.has_labels:
            item.pop('label', None)
        if self.opt['phase'] != 'train':
            item['lq_path'] = self.lq_path(index)
        return item

    def lq_path(self, index: int) -> str:
        """That of an item outside training, after which BasicSR names its output."""
        task, start = self.locate(index)
        path = Path(self.datasets[task].lq_path(index - start))
        return str(path.with_name(f'{self.names[task]}_{path.name}'))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Integers proportional to the weights that sum to the total (largest remainder method)."""
    exact = total * np.asarray(weights, np.float64) / sum(weights)
    counts = np.floor(exact).astype(int)
    for task in np.argsort(counts - exact, kind='stable')[: total - counts.sum()]:
        counts[task] += 1
    return counts.tolist()
