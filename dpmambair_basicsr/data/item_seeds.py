"""The same random numbers for the same item of the same epoch, whoever loads it, and after whatever was loaded before.

BasicSR's datasets, and ours, draw from the global generators of Python and NumPy. So that training can be resumed
exactly, BasicSR's sampler (see `patches/seeding`) accompanies each index with a seed, and whoever loads
the item first seeds the generators: our datasets in `__getitems__`, for BasicSR's the wrapper `SeededItems`.
"""

import hashlib
import random

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededIndex(int):
    """An index of a dataset, with the seed of the item's randomness, see `seed_generators`."""

    seed: tuple[str | int, ...]

    def __new__(cls, index: int, *seed: str | int):
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __getnewargs__(self):
        return int(self), *self.seed


def seed_generators(*seed: str | int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch; any difference of the seeds gives unrelated numbers."""
    number = int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=8).digest(), 'big')
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def item(dataset, index: int):
    """`dataset[index]`, whose randomness depends on the seed that comes with the index, if one does."""
    if isinstance(index, SeededIndex):
        seed_generators(*index.seed)
    return dataset[int(index)]


class SeededItems(Dataset):
    """A dataset that does not know `SeededIndex`. An item that cannot be loaded is named, with its path if known."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return item(self.dataset, index)
        except Exception as error:
            paths = getattr(self.dataset, 'paths', ())
            path = f', {paths[index]}' if isinstance(paths, list) and index < len(paths) else ''
            raise RuntimeError(f'item {int(index)}{path}: {type(error).__name__}: {error}') from error
