"""Completes and checks the options of the datasets."""

from os import path as osp

from dpmambair_basicsr.files.codec import max_pixels
from dpmambair_basicsr.files.option_row import Option

DEFAULTS = {'scale': 1, 'use_hflip': False, 'use_vflip': False, 'use_rot': False, 'pad_small': False}
CROPS = (
    Option('datasets', 'gt_size', int | None, 'side of the crops of the clean image, in training', low=1),
    Option('datasets', 'use_hflip', bool | None, 'flip left and right at random'),
    Option('datasets', 'use_vflip', bool | None, 'flip up and down at random'),
    Option('datasets', 'use_rot', bool | None, 'flip up and down, and transpose, at random'),
    Option('datasets', 'pad_small', bool | None, 'mirror images that are smaller than the crops'),
    Option('datasets', 'progressive', dict | None, 'gt_sizes, batch_sizes, iters by phase'),
)
CLEAN = (
    Option('datasets', 'dataroot_gt', str, 'folder of the clean images'),
    Option('datasets', 'meta_info_file', str | None, 'list of the images to use'),
)
TEMPLATE = Option('datasets', 'filename_tmpl', str, "stem of a degraded image's file by that of the clean one, as {}x4")
SEED = Option('datasets', 'seed', int, 'of the degradations in validation', low=0)
PHASES = ('train', 'val', 'test')


def complete_options(opt: dict, folder_keys: tuple[str, ...]) -> dict:
    """A copy of a dataset's options with defaults filled in and '~' expanded.

    `scale` defaults to 1, `io_backend` to {type: disk}, the flips and `pad_small` to false.

    Raises:
        ValueError: a missing folder, an unknown phase, a training set without a usable gt_size, or one of the colour
            and normalisation keys of BasicSR's PairedImageDataset: the networks take RGB in [0, 1].
    """
    opt = {**DEFAULTS, **opt}
    opt['io_backend'] = opt.get('io_backend') or {'type': 'disk'}
    owner = opt.get('name') or opt.get('type')
    if opt.get('phase') not in PHASES:
        raise ValueError(f'dataset {owner}: phase must be one of {", ".join(PHASES)}, got {opt.get("phase")!r}')
    for key in folder_keys:
        if not isinstance(opt.get(key), str):
            raise ValueError(f'dataset {owner}: {key} must be a path, got {opt.get(key)!r}')
        opt[key] = osp.expanduser(opt[key])
    if opt.get('meta_info_file') and opt['io_backend']['type'] == 'lmdb':
        raise ValueError(f'dataset {owner}: meta_info_file is ignored with lmdb, which has its own list; write ~')
    if opt.get('meta_info_file'):
        opt['meta_info_file'] = osp.expanduser(opt['meta_info_file'])
    if opt['phase'] == 'train':
        size = opt.get('gt_size')
        if not isinstance(size, int) or size < 1 or size % opt['scale']:
            raise ValueError(
                f'dataset {owner}: gt_size must be a positive multiple of scale {opt["scale"]}, got {size!r}'
            )
        if size**2 > max_pixels():
            raise ValueError(f'dataset {owner}: crops of gt_size {size} have more than max_pixels, {max_pixels()}')
    for key in ('color', 'mean', 'std'):
        if opt.get(key) is not None:
            raise ValueError(f'dataset {owner}: {key} is not supported, images are RGB in [0, 1]')
    return opt
