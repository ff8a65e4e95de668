"""Reproducible randomness per item and epoch, independent of the worker and of what it loaded before.

BasicSR's datasets, and ours, draw from the global generators of Python and NumPy. For bit-exact resume, BasicSR's
sampler (see `patches/seeding`) attaches a seed to each index, and the generators are seeded before an item is loaded:
by our datasets in `__getitems__`, for BasicSR's by the wrapper `SeededItems`.
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
    """Seeds the generators of Python, NumPy and PyTorch; different seeds give unrelated numbers."""
    number = int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=8).digest(), 'big')
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def item(dataset, index: int):
    """`dataset[index]`, with its randomness seeded by the index, if that has a seed."""
    if isinstance(index, SeededIndex):
        seed_generators(*index.seed)
    return dataset[int(index)]


class SeededItems(Dataset):
    """Wraps a dataset that does not support `SeededIndex`. Errors name the item, and its path if known."""

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
