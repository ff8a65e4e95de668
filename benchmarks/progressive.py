#!/usr/bin/env python
"""Images decoded per used crop in progressive training: with `progressive`, and as in Restormer.

    python benchmarks/progressive.py [--side 512] [--batches 4]

Restormer's loader makes a full batch of the largest crops in every phase, and its model then uses a part of it.
Measured on synthetic pictures of --side x --side pixels, without workers, for the phases of
options/train_vmambair_derain.yml.
"""

import argparse
import tempfile
import time
from pathlib import Path

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable)

# isort: split
import cv2
import numpy as np
import yaml
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler

from dpmambair_basicsr.files.images import ImageReader

OPTIONS = Path(__file__).parents[1] / 'options' / 'train_vmambair_derain.yml'


class CountingReader(ImageReader):
    decoded = 0  # GT images; each comes with its LQ image

    def read(self, path, role, index):
        self.decoded += role == 'gt'
        return super().read(path, role, index)


def measure(options: dict, iteration: int, batches: int, keep=None) -> tuple[float, float]:
    """Batches as BasicSR loads them after `iteration` iterations.

    Args:
        keep: (crop size, batch size) to which the model cuts each batch, as in Restormer; None: all of it is used.

    Returns:
        Images decoded per used crop, milliseconds per batch.
    """
    dataset = build_dataset(options)
    folders = {role: options[f'dataroot_{role}'] for role in ('lq', 'gt')}
    dataset.images = CountingReader(dataset.opt['io_backend'], folders)
    sampler = EnlargedSampler(dataset, 1, 0)
    loader = build_dataloader(dataset, options, num_gpu=0, sampler=sampler, seed=0)
    sampler.run.iteration = iteration
    used, start = 0, time.perf_counter()
    for batch, _ in zip(loader, range(batches), strict=False):
        gt = batch['gt'] if keep is None else batch['gt'][: keep[1], :, : keep[0], : keep[0]]
        used += len(gt)
    return dataset.images.decoded / used, (time.perf_counter() - start) / batches * 1000


def compare(options: dict, batches: int) -> list[tuple]:
    """For each phase: crop and batch size, then decoded images per used crop and ms per batch, ours and Restormer's."""
    plain = {key: value for key, value in options.items() if key != 'progressive'}
    phases, start, rows = options['progressive'], 0, []
    for size, batch, length in zip(phases['gt_sizes'], phases['batch_sizes'], phases['iters'], strict=True):
        here, restormer = measure(options, start, batches), measure(plain, start, batches, keep=(size, batch))
        rows.append((size, batch, *here, *restormer))
        start += length
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--side', type=int, default=512, help='height and width of the pictures')
    parser.add_argument('--batches', type=int, default=4, help='batches per phase')
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        options = yaml.safe_load(OPTIONS.read_text())['datasets']['train']
        options |= {'phase': 'train', 'scale': 1, 'num_worker_per_gpu': 0}
        rng = np.random.default_rng(0)
        for key in ('dataroot_gt', 'dataroot_lq'):
            options[key] = str(Path(folder, key))
            Path(folder, key).mkdir()
            for index in range(args.batches * options['batch_size_per_gpu']):
                coarse = rng.integers(0, 256, (args.side // 8, args.side // 8, 3), dtype=np.uint8)
                picture = cv2.resize(coarse, (args.side, args.side), interpolation=cv2.INTER_CUBIC)
                cv2.imwrite(str(Path(options[key], f'{index:03}.png')), picture)
        rows = compare(options, args.batches)

    print('| crop | batch | decoded per used crop | Restormer | ms per batch | Restormer |')
    print('|---|---|---|---|---|---|')
    for size, batch, here, here_ms, restormer, restormer_ms in rows:
        print(f'| {size} | {batch} | {here:.1f} | {restormer:.1f} | {here_ms:.0f} | {restormer_ms:.0f} |')


if __name__ == '__main__':
    main()
