import torch
from torch import Tensor, nn

from dpmambair_basicsr.registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class PSNRLoss(nn.Module):
    """`loss_weight` x the negative PSNR in dB, mean over the batch, as in the training of HINet and NAFNet.

    Images count by their relative error, so in mixed data slight degradations weigh as much as severe ones.
    Not part of VmambaIR or DPMambaIR.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]; 1e-8 is added to the mean squared errors, so the maximum is 80 dB."""
        error = (pred.float() - target.float()).square().mean(dim=(1, 2, 3))
        return self.loss_weight * 10 * torch.log10(error + 1e-8).mean()
