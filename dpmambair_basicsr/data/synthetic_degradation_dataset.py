import random
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from dpmambair_basicsr.data.dataset_options import CLEAN, CROPS, SEED, complete_options
from dpmambair_basicsr.data.degradations import DEGRADATIONS, degrade, demo_strengths, synthetic, to_uint8
from dpmambair_basicsr.data.progressive import ProgressiveBatches
from dpmambair_basicsr.files.image_folders import list_images
from dpmambair_basicsr.files.image_lists import list_keys, listed_images
from dpmambair_basicsr.files.images import ImageReader, fit_crop, flip, to_float, to_tensor
from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.registry import DATASET_REGISTRY


@DATASET_REGISTRY.register()
class SyntheticDegradationDataset(ProgressiveBatches, Dataset):
    """Clean images, degraded on the fly by `dpmambair_basicsr.data.degradations`.

    Items: `lq`, `gt` (3, h, w) RGB float32 in [0, 1], `lq` rounded to 8 bits as a stored file would be; `lq_path`,
    `gt_path`; `degradation` and its index `label`.

    Training: one item per image. The whole image is degraded by a random kind, as in stored pairs (a crop has neither
    the depth of its scene nor the pixels that a blur moves into it), then cropped to gt_size and flipped. All
    randomness comes from Python's `random`, which BasicSR seeds in every worker.
    Otherwise: one item per image and kind, image by image, on the whole image, the same in every run and process: the
    degradation is seeded by `seed`, the image's name and the kind. With several kinds, `lq_path` is the GT's path with
    the kind appended to the stem: no such file exists, but BasicSR names its output after it.

    Options:
        dataroot_gt, meta_info_file, io_backend, gt_size, use_hflip, use_vflip, use_rot, pad_small, progressive: as
            PairedDegradationDataset's.
        degradations: list of names of degradations that have a function, or a mapping from name to parameters of that
            function. `demo` in place of the parameters: those of the demo; in place of the list: all of the demo.
        gt_gamma: (low, high): in training, each clean image is first raised to an exponent drawn log-uniformly from
            this range, for darker and lighter scenes; also applied to `gt`. Default: none.
        seed: int >= 0, default 0; not used in training.

    Raises:
        ValueError: invalid options; on access, a broken image or one smaller than gt_size (file and item).
    """

    option_keys = (
        *CROPS,
        *CLEAN,
        Option('datasets', 'degradations', Literal['demo'] | list[str] | dict, 'names, or names with their parameters'),
        Option('datasets', 'gt_gamma', list[float] | None, 'in training, exponents of the clean images, [low, high]'),
        SEED,
    )

    def __init__(self, opt):
        opt = self.opt = complete_options(opt, ('dataroot_gt',))
        if opt['scale'] != 1:
            raise ValueError(f'SyntheticDegradationDataset does not resize: scale must be 1, got {opt["scale"]!r}')
        self.parameters = _parse_degradations(opt.get('degradations'))
        self.kinds = list(self.parameters)
        self.seed = opt.get('seed', 0)
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f'seed: expected int >= 0, got {self.seed!r}')
        self.gamma = _parse_gamma(opt.get('gt_gamma'))
        folder = opt['dataroot_gt']
        if opt['io_backend']['type'] == 'lmdb':
            self.paths = list(list_keys(folder))
        elif opt.get('meta_info_file'):
            self.paths = listed_images(opt['meta_info_file'], folder)
        else:
            self.paths = list(list_images(folder).values())
        if not self.paths:
            raise ValueError(f'no images in {opt.get("meta_info_file") or folder}')
        self.images = ImageReader(opt['io_backend'], {'gt': folder})
        self.start_progressive()

    @property
    def labels(self) -> set[int]:
        return {DEGRADATIONS[kind].label for kind in self.kinds}

    def __len__(self):
        return len(self.paths) * (1 if self.opt['phase'] == 'train' else len(self.kinds))

    def __getitem__(self, index):
        if self.opt['phase'] == 'train':
            path, kind = self.paths[index], random.choice(self.kinds)
            rng = np.random.default_rng(random.getrandbits(64))
        else:
            image, kind = divmod(index, len(self.kinds))
            path, kind = self.paths[image], self.kinds[kind]
            name = Path(path).stem.encode(errors='surrogateescape')  # which need not be UTF-8
            rng = np.random.default_rng([self.seed, zlib.crc32(name), DEGRADATIONS[kind].label])
        gt = self.images.read(path, 'gt', index)
        if self.gamma is not None and self.opt['phase'] == 'train':
            gt = to_uint8(to_float(gt) ** np.float32(np.exp(rng.uniform(*np.log(self.gamma)))))
        lq = to_uint8(degrade(to_float(gt), kind, rng, **self.parameters[kind]))
        if self.opt['phase'] == 'train':
            gt, lq = flip(self._random_crop([gt, lq], path, index), self.opt)
        gt, lq = to_float(gt), to_float(lq)
        return {
            'lq': to_tensor(lq),
            'gt': to_tensor(gt),
            'lq_path': self._named_after(path, kind),
            'gt_path': path,
            'degradation': kind,
            'label': DEGRADATIONS[kind].label,
        }

    def lq_path(self, index: int) -> str:
        """That of an item outside training, after which BasicSR names its output."""
        image, kind = divmod(index, len(self.kinds))
        return self._named_after(self.paths[image], self.kinds[kind])

    def _named_after(self, path: str, kind: str) -> str:
        return path if len(self.kinds) == 1 else str(Path(path).with_stem(f'{Path(path).stem}_{kind}'))

    def _random_crop(self, images, path, index):
        size = self.opt['gt_size']
        images = [fit_crop(image, size, self.opt['pad_small'], path, index) for image in images]
        top, left = (random.randint(0, side - size) for side in images[0].shape[:2])
        return [image[top : top + size, left : left + size] for image in images]


def _parse_gamma(value) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
    if not numbers or not 0.1 <= value[0] <= value[1] <= 10:
        raise ValueError(f'gt_gamma must be [low, high], within [0.1, 10], got {value!r}')
    return tuple(value)


def _parse_degradations(choice: str | list | dict | None) -> dict[str, dict]:
    """{kind: parameters}; every kind is run once, to report a bad value now rather than hours into a run."""
    demo = demo_strengths()
    choice = demo if choice == 'demo' else choice
    if not isinstance(choice, list | dict) or not choice:
        raise ValueError(f'degradations must name some of {", ".join(synthetic())}, or be demo, got {choice!r}')
    parameters = {}
    for kind in choice:
        if kind in parameters:
            raise ValueError(f'degradations, {kind}: listed more than once; all kinds are drawn equally often')
        values = (choice[kind] if isinstance(choice, dict) else None) or {}
        if values == 'demo' and kind not in demo:
            raise ValueError(f'degradations, {kind}: not in the demo, choose from {", ".join(demo)}')
        parameters[kind] = dict(demo[kind] if values == 'demo' else values)
        try:
            degrade(np.zeros((16, 16, 3), np.float32), kind, np.random.default_rng(0), **parameters[kind])
        except ValueError as error:
            raise ValueError(f'degradations, {kind}: {error}') from error
    return parameters
