"""For tests that run BasicSR's own pipelines in this process: the commands without their startup."""

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import skimage.data
from basicsr.test import test_pipeline
from basicsr.train import train_pipeline

import dpmambair_basicsr
from dpmambair_basicsr.files import lock
from dpmambair_basicsr.patches.apply import apply_patches

ROOT = Path(__file__).parents[2]

dpmambair_basicsr.register()
apply_patches()


@contextmanager
def logged():
    """Collects what BasicSR logs."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger('basicsr')
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # BasicSR does not set it once a logger was requested without a file
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def run_pipeline(pipeline, option_file, *arguments, cwd) -> str:
    """Runs a pipeline in directory cwd with BasicSR's arguments; returns the log."""
    saved = sys.argv, Path.cwd()
    sys.argv = ['pipeline', '-opt', str(option_file), *map(str, arguments)]
    os.chdir(cwd)
    try:
        with logged() as records:
            pipeline(str(cwd))
    finally:
        lock.release()  # as at the end of a process
        sys.argv = saved[0]
        os.chdir(saved[1])
    return '\n'.join(records)


def train(option_file, *arguments, cwd) -> str:
    return run_pipeline(train_pipeline, option_file, *arguments, cwd=cwd)


def test(option_file, *arguments, cwd) -> str:
    return run_pipeline(test_pipeline, option_file, *arguments, cwd=cwd)


test.__test__ = False  # not a test, for pytest


def write_pairs(folder: Path, sizes: list[tuple[int, int]], scale: int = 1) -> dict[str, str]:
    """Crops of a photograph of the given (height, width) as GT, noisy or downscaled as LQ; returns their options."""
    photo, rng = skimage.data.astronaut()[..., ::-1], np.random.default_rng(0)
    for kind in ('GT', 'LQ'):
        (folder / kind).mkdir(parents=True)
    for index, (height, width) in enumerate(sizes):
        top, left = 40 * index, 100 + 30 * index
        gt = photo[top : top + height, left : left + width]
        if scale == 1:
            lq = (gt + rng.normal(0, 20, gt.shape)).clip(0, 255).astype(np.uint8)
        else:
            lq = cv2.resize(gt, (width // scale, height // scale), interpolation=cv2.INTER_AREA)
        for kind, image in (('GT', gt), ('LQ', lq)):
            assert cv2.imwrite(str(folder / kind / f'{index:02}.png'), image)
    return {'dataroot_gt': str(folder / 'GT'), 'dataroot_lq': str(folder / 'LQ')}


def write_photos(folder: Path) -> dict[str, str]:
    """Photographs and their meta_info file; returns the options that name both."""
    folder.mkdir()
    for name in ('astronaut', 'coffee'):
        assert cv2.imwrite(str(folder / f'{name}.png'), getattr(skimage.data, name)()[..., ::-1])
    (folder / 'meta_info.txt').write_text('astronaut.png (512,512,3)\ncoffee.png (400,600,3)\n')
    return {'dataroot_gt': str(folder), 'meta_info': str(folder / 'meta_info.txt')}
