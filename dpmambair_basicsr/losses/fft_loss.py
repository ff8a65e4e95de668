import torch
from torch import Tensor, nn

from dpmambair_basicsr.registry import LOSS_REGISTRY


def fft_l1(pred: Tensor, target: Tensor) -> Tensor:
    """Mean of |Re F(pred - target)| and |Im F(pred - target)| over all entries of the full spectrum.

    F is the un-normalised 2-D DFT over the last two axes. As in FocalNet (Cui et al. 2023), the L1 distance between the
    stacked real and imaginary parts of the two spectra; F is linear, so one transform is enough. fp16 and bf16
    are computed in fp32. The value grows with the image, for white noise as sqrt(H W).

    Args:
        pred, target: (..., H, W), real.
    """
    work = torch.promote_types(pred.dtype, torch.float32)
    return torch.view_as_real(torch.fft.fft2(pred.to(work) - target.to(work))).abs().mean()


@LOSS_REGISTRY.register()
class FFTLoss(nn.Module):
    """`loss_weight` x `fft_l1`: L_fft of DPMambaIR (arXiv 2504.17732, weight 0.001).

    The paper does not define the transform's normalisation; FocalNet's is our choice.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.loss_weight * fft_l1(pred, target)
