"""Real-ESRGAN's degradation in training (Wang et al. 2021, Sec. 3), as in BasicSR's models, but on any device."""

from dataclasses import replace

import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils import DiffJPEG
from torch import nn

from dpmambair_basicsr.files.option_row import Option

FIRST_ORDER = (
    Option('', 'resize_prob', list[float], 'of up, down, keep'),
    Option('', 'resize_range', list[float], 'least and greatest factor'),
    Option('', 'gaussian_noise_prob', float, 'otherwise the noise is Poisson', low=0, high=1),
    Option('', 'noise_range', list[float], 'sigma of Gaussian noise, in 1/255'),
    Option('', 'poisson_scale_range', list[float], 'scale of Poisson noise'),
    Option('', 'gray_noise_prob', float, 'of one noise for all channels', low=0, high=1),
    Option('', 'jpeg_range', list[float], 'quality'),
)
DEGRADATION = (
    *FIRST_ORDER,
    *(replace(row, name=f'{row.name}2', text=f'{row.text}; second order') for row in FIRST_ORDER),
    Option('', 'second_blur_prob', float, 'of a blur in the second order', low=0, high=1),
    Option('', 'gt_size', int, 'side of the crops of the clean image, after the degradation', low=1),
)
QUEUE_SIZE = 180
SHARPENING = ('gt_usm', 'l1_gt_usm', 'percep_gt_usm', 'gan_gt_usm')


class TwoOrderDegradation(SRModel):
    """Mix-in for RealESRNetModel and RealESRGANModel, whose `feed_data` makes LQ images from GT images and kernels.

    BasicSR's own constructors and their pool of training pairs call .cuda(); here all is on the model's device.

    Options at the top level of the file, as in BasicSR: those of the two orders (blur kernels come with
    the images of RealESRGANDataset), `gt_size` of the final crop, and
        queue_size: size of the pool of training pairs, from which batches of mixed degradations are drawn; default 180.
        high_order_degradation: false to train on the dataset's own `lq` and `gt`; default true.
    There is no sharpening (USM), as in VmambaIR; BasicSR's keys for it may be absent or false.
    """

    option_keys = (
        *DEGRADATION,
        *(Option('', key, bool | None, 'absent or false: there is no sharpening') for key in SHARPENING),
        Option('', 'queue_size', int, 'of the pool that batches are drawn from', low=1),
        Option('', 'high_order_degradation', bool | None, "false: the dataset's own LQ images"),
    )

    @classmethod
    def check_degradation(cls, opt: dict) -> None:
        """Raises ValueError naming top-level keys that are missing or invalid for a training."""
        for key in SHARPENING:
            if opt.get(key):
                raise ValueError(f'{key}: {opt[key]}, but {cls.__name__} does not sharpen; write false')
        if not opt.get('high_order_degradation', True):
            return
        missing = [row.name for row in DEGRADATION if row.name not in opt]
        if missing:
            raise ValueError(f'{", ".join(missing)}: missing, required by the two-order degradation')
        batch_size = opt['datasets']['train']['batch_size_per_gpu']
        if not opt['dist']:
            batch_size *= max(opt['num_gpu'], 1)
        batch_size *= opt['train'].get('accum_iter', 1)
        if opt.get('queue_size', QUEUE_SIZE) % batch_size:
            raise ValueError(
                f'queue_size: {opt.get("queue_size", QUEUE_SIZE)} is not a multiple of the batch size {batch_size} '
                '(datasets.train.batch_size_per_gpu, times train.accum_iter, times the number of GPUs where one '
                'process uses them all)'
            )

    def __init__(self, opt: dict):
        for key in SHARPENING:  # BasicSR's models read them without a default
            opt.setdefault(key, False)
        self.queue_size = opt.get('queue_size', QUEUE_SIZE)
        SRModel.__init__(self, opt)  # skips BasicSR's constructor, which adds the following with .cuda()
        self.jpeger = DiffJPEG(differentiable=False).to(self.device)
        # On a CPU, padding keeps DiffJPEG's permuted layout, and view() fails in BasicSR's filter2D.
        self.jpeger.register_forward_hook(lambda module, inputs, image: image.contiguous())
        self.usm_sharpener = nn.Identity()

    @torch.no_grad()
    def _dequeue_and_enqueue(self) -> None:
        if not hasattr(self, 'queue_lr'):
            self.queue_lr = self.lq.new_zeros(self.queue_size, *self.lq.shape[1:])
            self.queue_gt = self.gt.new_zeros(self.queue_size, *self.gt.shape[1:])
            self.queue_ptr = 0
        super()._dequeue_and_enqueue()  # pyright: ignore[reportAttributeAccessIssue]
