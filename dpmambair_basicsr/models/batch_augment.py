"""Mixup and CutMix of the images of a batch."""

import math

import torch
from torch import Tensor

from dpmambair_basicsr.files.errors import OptionError
from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.registry import did_you_mean

KINDS = ('mixup', 'cutmix')
KEYS = ('alpha', 'prob')


class BatchAugment:
    """Mixes each image of a batch with another of the same batch, degraded and clean alike, once per iteration.

    mixup (Zhang et al., ICLR 2018, arXiv 1710.09412): lam times the image and 1 - lam times the other.
    cutmix (Yun et al., ICCV 2019, arXiv 1905.04899): a rectangle of the other, 1 - lam of the area unless the border
        cuts it; its edges are between pixels of the degraded image.

    One lam per batch is drawn from Beta(alpha, alpha), and one of the kinds, or none, by `prob`. Not used by either of
    the two papers. All random numbers come from torch's CPU generator, which is reseeded in each iteration
    (`patches/signals`), so resume is bit-exact.

    Args:
        opt: of the training. `train.batch_augment`: {mixup: {alpha, prob}, cutmix: {alpha, prob}}, either may be
            missing. alpha > 0, default 1; prob in [0, 1], the two at most 1 together.
    """

    option_keys = (
        Option('train', 'batch_augment', dict | None, 'mixup: {alpha, prob}, cutmix: {alpha, prob}; of each batch'),
    )

    def __init__(self, opt: dict):
        self.kinds = (opt.get('train') or {}).get('batch_augment') or {}

    @staticmethod
    def check_options(opt: dict, uses_labels: bool) -> None:
        """Raises OptionError naming what is wrong with `train.batch_augment`, or incompatible with it.

        Args:
            uses_labels: whether the degradation label is learnt, or given to the network.
        """
        kinds, path = opt['train']['batch_augment'], 'train.batch_augment'
        if uses_labels:
            raise OptionError(f'{path}: mixed images have no single degradation label, which is used here; write ~')
        for kind, options in kinds.items():
            check_kind(f'{path}.{kind}', kind, options)
        total = sum(options['prob'] for options in kinds.values())
        if total > 1:
            raise OptionError(f'{path}: the values of prob must sum to at most 1, got {total}')
        train = opt['datasets']['train']
        sizes = (train.get('progressive') or {}).get('batch_sizes') or [train.get('batch_size_per_gpu', 2)]
        if min(sizes) * opt['train'].get('accum_iter', 1) < 2:
            raise OptionError(f'{path}: a batch of one image cannot be mixed; raise datasets.train.batch_size_per_gpu')

    def apply(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mixed images.

        Args:
            images: name -> (b, c, h, w), the same b images in each; those of one entry may be larger than those of
                another by an integer.
        """
        if not self.kinds:
            return images
        draw = torch.rand(()).item()
        for kind in KINDS:
            options = self.kinds.get(kind) or {'prob': 0}
            if draw < options['prob']:
                return self.mix(kind, float(options.get('alpha', 1)), images)
            draw -= options['prob']
        return images

    def mix(self, kind: str, alpha: float, images: dict[str, Tensor]) -> dict[str, Tensor]:
        count = len(next(iter(images.values())))
        lam = torch.distributions.Beta(alpha, alpha).sample().item()
        others = (torch.arange(count) + torch.randint(1, count, ())) % count  # none is its own
        if kind == 'mixup':
            return {name: torch.lerp(value[others], value, lam) for name, value in images.items()}
        height, width = min(value.shape[-2:] for value in images.values())
        top, bottom, left, right = rectangle(height, width, 1 - lam)
        mixed = {}
        for name, value in images.items():
            scale = value.shape[-1] // width
            rows, columns = slice(top * scale, bottom * scale), slice(left * scale, right * scale)
            mixed[name] = value.clone()
            mixed[name][..., rows, columns] = value[others][..., rows, columns]
        return mixed


def check_kind(path: str, kind: str, options) -> None:
    if kind not in KINDS:
        raise OptionError(f'{path}: unknown key{did_you_mean(kind, KINDS)}')
    if not isinstance(options, dict):
        raise OptionError(f'{path}: expected a section with prob and alpha, got {options!r}')
    for key, value in options.items():
        if key not in KEYS:
            raise OptionError(f'{path}.{key}: unknown key{did_you_mean(key, KEYS)}')
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise OptionError(f'{path}.{key}: expected number >= 0, got {value!r}')
    if 'prob' not in options:
        raise OptionError(f'{path}.prob: missing')
    if options.get('alpha', 1) == 0:
        raise OptionError(f'{path}.alpha: must be above 0')


def rectangle(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a randomly placed rectangle of this share of the area, clipped to the image."""
    side = math.sqrt(share)
    edges = []
    for size in (height, width):
        centre, half = torch.randint(size, ()).item(), round(size * side) // 2
        edges += [max(0, centre - half), min(size, centre + half)]
    return tuple(edges)
