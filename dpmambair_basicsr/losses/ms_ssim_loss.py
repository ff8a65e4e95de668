import torch
from torch import Tensor, nn

from dpmambair_basicsr.losses.piq_library import import_piq
from dpmambair_basicsr.registry import LOSS_REGISTRY

WINDOW = 11  # side of the Gaussian window, of sigma 1.5
SCALES = 5


@LOSS_REGISTRY.register()
class MSSSIMLoss(nn.Module):
    """`loss_weight` x (1 - MS-SSIM) (Wang et al. 2003), from the package piq; mean over the batch.

    Images are (b, c, h, w) in [0, 1]. Values of `pred` outside that range are clamped, as piq requires, and get no
    gradient, so combine this loss with a pixel loss. fp16 and bf16 are computed in fp32.

    Args:
        loss_weight: weight of the loss.
        scale_weights: exponents of the scales, each of which halves the image, normalised to a sum of 1; default: the
            paper's five, which need crops of 161 pixels. Three need 41.

    Raises:
        MissingLibraryError: piq is not installed.
        ValueError: images too small for the number of scales.
    """

    def __init__(self, loss_weight: float = 1.0, scale_weights: list[float] | None = None):
        super().__init__()
        self.loss_weight = loss_weight
        self.similarity = import_piq('MSSSIMLoss').multi_scale_ssim
        self.register_buffer('scale_weights', None if scale_weights is None else torch.tensor(scale_weights))

    @staticmethod
    def least_size(arguments: dict) -> int:
        """Minimum crop size in pixels; `arguments` as in the option file."""
        return (WINDOW - 1) * 2 ** (len(arguments.get('scale_weights') or range(SCALES)) - 1) + 1

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        pair = pred.float().clamp(0, 1), target.float()
        return self.loss_weight * (1 - self.similarity(*pair, kernel_size=WINDOW, scale_weights=self.scale_weights))
