from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dpmambair_basicsr.data.dataset_options import CLEAN, CROPS, TEMPLATE, complete_options
from dpmambair_basicsr.data.degradations import DEGRADATIONS
from dpmambair_basicsr.data.progressive import ProgressiveBatches
from dpmambair_basicsr.files.image_folders import list_images, pair_images
from dpmambair_basicsr.files.image_lists import list_keys, listed_pairs
from dpmambair_basicsr.files.images import ImageReader, fit_crop, flip, to_float, to_tensor
from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.registry import DATASET_REGISTRY


@DATASET_REGISTRY.register()
class PairedDegradationDataset(ProgressiveBatches, Dataset):
    """BasicSR's PairedImageDataset, plus the degradation's label, vertical flips and errors that name the file.

    Items: `lq`, `gt` (3, h, w) RGB float32 in [0, 1]; `lq_path`, `gt_path`; `degradation` ('' if not given) and, if
    given, its index `label`. In training a random crop of gt_size, then flips, the same for both; else the whole image.

    Options in addition to BasicSR's:
        degradation: that of the LQ images, one of DEGRADATIONS.
        use_vflip: vertical flips only, as in the paper (use_rot also transposes). Default false.
        pad_small: pad images smaller than gt_size by reflection at the bottom and right, as in Restormer; if false
            (default), they are an error.
        progressive: crop and batch sizes by phase of the training, see `progressive.Phases`.
    `scale` defaults to 1 and `io_backend` to disk. Images are paired by stem, so a JPEG may pair with a PNG, in
    alphabetical order. A GT image may exceed scale times its LQ image by less than scale pixels, which are cropped.

    Raises:
        ValueError: invalid options or folders; on access, a broken image or mismatched sizes.
    """

    option_keys = (
        *CROPS,
        *CLEAN,
        Option('datasets', 'dataroot_lq', str, 'folder of the degraded images'),
        TEMPLATE,
        Option('datasets', 'degradation', str | None, f'one of {", ".join(DEGRADATIONS)}'),
    )

    def __init__(self, opt):
        opt = self.opt = complete_options(opt, ('dataroot_gt', 'dataroot_lq'))
        name = opt.get('degradation')
        if name is not None and str(name) not in DEGRADATIONS:
            raise ValueError(f'degradation must be one of {", ".join(DEGRADATIONS)}, got {name!r}')
        self.kind: dict[str, Any] = (
            {'degradation': ''} if name is None else {'degradation': name, 'label': DEGRADATIONS[name].label}
        )
        folders = {'lq': opt['dataroot_lq'], 'gt': opt['dataroot_gt']}
        template = opt.get('filename_tmpl', '{}')
        if opt['io_backend']['type'] == 'lmdb':
            self.paths = pair_images(list_keys(folders['lq']), list_keys(folders['gt']))
        elif opt.get('meta_info_file'):
            self.paths = listed_pairs(opt['meta_info_file'], **folders, filename_tmpl=template)
        else:
            self.paths = pair_images(list_images(folders['lq']), list_images(folders['gt']), template)
        if not self.paths:
            raise ValueError(f'no images in {opt.get("meta_info_file") or opt["dataroot_gt"]}')
        self.images = ImageReader(opt['io_backend'], folders)
        self.start_progressive()

    @property
    def has_labels(self) -> bool:
        return 'label' in self.kind

    @property
    def labels(self) -> set[int]:
        return {int(self.kind['label'])} if self.has_labels else set()

    def __len__(self):
        return len(self.paths)

    def lq_path(self, index: int) -> str:
        """That of an item, after which BasicSR names its output."""
        return self.paths[index]['lq_path']

    def read_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """LQ and GT as they are stored, GT cropped to scale times the size of LQ; ValueError if the sizes differ."""
        scale, paths = self.opt['scale'], self.paths[index]
        lq = self.images.read(paths['lq_path'], 'lq', index)
        gt = self.images.read(paths['gt_path'], 'gt', index)

        height, width = lq.shape[0] * scale, lq.shape[1] * scale
        if not (0 <= gt.shape[0] - height < scale and 0 <= gt.shape[1] - width < scale):
            raise ValueError(
                f'item {index}: sizes do not match at scale {scale}: lq {paths["lq_path"]} is '
                f'{lq.shape[1]}x{lq.shape[0]}, gt {paths["gt_path"]} is {gt.shape[1]}x{gt.shape[0]} (width x height)'
            )
        return lq, gt[:height, :width]

    def __getitem__(self, index):
        scale, paths = self.opt['scale'], self.paths[index]
        lq, gt = self.read_pair(index)
        if self.opt['phase'] == 'train':
            from basicsr.data.transforms import paired_random_crop

            size, pad = self.opt['gt_size'], self.opt['pad_small']
            gt = fit_crop(gt, size, pad, paths['gt_path'], index)
            lq = fit_crop(lq, size // scale, pad, paths['lq_path'], index)
            gt, lq = paired_random_crop(gt, lq, size, scale)
            gt, lq = flip([gt, lq], self.opt)

        return {'lq': to_tensor(to_float(lq)), 'gt': to_tensor(to_float(gt)), **paths, **self.kind}
