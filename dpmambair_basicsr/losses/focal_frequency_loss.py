import torch
from torch import Tensor, nn

from dpmambair_basicsr.registry import LOSS_REGISTRY


def focal_frequency(pred: Tensor, target: Tensor, alpha: float = 1.0, patch_factor: int = 1) -> Tensor:
    """Mean over the spectrum of w |F(pred) - F(target)|^2 (Jiang et al., ICCV 2021, arXiv 2012.12821, Eq. 5 to 8).

    F is the orthonormal 2-D DFT, as in the authors' code. The weights w = |F(pred) - F(target)|^alpha, divided by their
    largest value in each channel, have no gradient: the largest errors count most. fp16 and bf16 are computed in fp32.

    Args:
        pred, target: (b, c, H, W), real.
        alpha: larger values focus more on large errors.
        patch_factor: number of parts into which H and W are split, each with its own spectrum.

    Raises:
        ValueError: H or W is not a multiple of `patch_factor`.
    """
    if pred.shape[-2] % patch_factor or pred.shape[-1] % patch_factor:
        raise ValueError(f'patch_factor: {patch_factor} does not divide the sides of {tuple(pred.shape)}')
    work = torch.promote_types(pred.dtype, torch.float32)
    difference = pred.to(work) - target.to(work)  # F is linear, so one transform is enough
    height, width = (side // patch_factor for side in difference.shape[-2:])
    patches = difference.unfold(-2, height, height).unfold(-2, width, width)  # (b, c, p, p, H / p, W / p)
    spectrum = torch.view_as_real(torch.fft.fft2(patches, norm='ortho'))
    distance = spectrum.square().sum(-1)
    weight = distance.detach().sqrt() ** alpha
    largest = weight.amax((-2, -1), keepdim=True)
    weight = torch.where(largest > 0, weight / largest, 0.0)  # equal images: 0 / 0
    return (weight * distance).mean()


@LOSS_REGISTRY.register()
class FocalFrequencyLoss(nn.Module):
    """`loss_weight` x the focal frequency loss (Jiang et al. 2021), which focuses on the worst frequencies.

    Not part of VmambaIR or DPMambaIR. Without the ablation options of the authors' code.

    Args:
        loss_weight: weight of the loss.
        alpha: larger values focus more on the worst frequencies.
        patch_factor: number of parts into which height and width are split, each with its own spectrum.

    Raises:
        ValueError: `patch_factor` is less than 1, or does not divide the sides of the images.
    """

    def __init__(self, loss_weight: float = 1.0, alpha: float = 1.0, patch_factor: int = 1):
        if patch_factor < 1:
            raise ValueError(f'patch_factor must be at least 1, got {patch_factor}')
        super().__init__()
        self.loss_weight, self.alpha, self.patch_factor = loss_weight, alpha, patch_factor

    @classmethod
    def crop_unit(cls, arguments: dict) -> int:
        """What the size of crops must be a multiple of; `arguments` as in the option file."""
        return cls(**arguments).patch_factor

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.loss_weight * focal_frequency(pred, target, self.alpha, self.patch_factor)
