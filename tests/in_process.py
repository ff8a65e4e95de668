"""For tests that run BasicSR's own pipelines in this process: `python -m dpmambair_basicsr.train` without its start-up."""

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import dpmambair_basicsr

# isort: split
import cv2
import numpy as np
from basicsr.test import test_pipeline
from basicsr.train import train_pipeline

ROOT = Path(__file__).parents[1]

dpmambair_basicsr.register()


@contextmanager
def logged():
    """Collects what BasicSR logs."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger('basicsr')
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def run_pipeline(pipeline, option_file, *arguments, cwd) -> str:
    """Runs it in directory cwd with BasicSR's arguments; returns the log."""
    saved = sys.argv, Path.cwd()
    sys.argv = ['pipeline', '-opt', str(option_file), *map(str, arguments)]
    os.chdir(cwd)
    try:
        with logged() as records:
            pipeline(str(cwd))
    finally:
        sys.argv = saved[0]
        os.chdir(saved[1])
    return '\n'.join(records)


def train(option_file, *arguments, cwd) -> str:
    return run_pipeline(train_pipeline, option_file, *arguments, cwd=cwd)


def test(option_file, *arguments, cwd) -> str:
    return run_pipeline(test_pipeline, option_file, *arguments, cwd=cwd)


test.__test__ = False  # not a test, for pytest


def write_pairs(folder: Path, sizes: list[tuple[int, int]], scale: int = 1) -> dict[str, str]:
    """Smooth colour pictures of the given (height, width) as GT, shrunk or noisy as LQ; the options that name them."""
    rng = np.random.default_rng(len(sizes))
    for kind in ('GT', 'LQ'):
        (folder / kind).mkdir(parents=True)
    for index, (height, width) in enumerate(sizes):
        coarse = rng.integers(0, 256, (5, 5, 3)).astype(np.float32)
        gt = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255)
        if scale == 1:
            lq = (gt + rng.normal(0, 20, gt.shape)).clip(0, 255)
        else:
            lq = cv2.resize(gt, (width // scale, height // scale), interpolation=cv2.INTER_AREA)
        for kind, image in (('GT', gt), ('LQ', lq)):
            assert cv2.imwrite(str(folder / kind / f'{index:02}.png'), image.astype(np.uint8))
    return {'dataroot_gt': str(folder / 'GT'), 'dataroot_lq': str(folder / 'LQ')}
