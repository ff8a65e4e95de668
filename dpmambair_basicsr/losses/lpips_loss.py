from torch import Tensor, nn

from dpmambair_basicsr.losses.lpips_network import build_lpips
from dpmambair_basicsr.registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class LPIPSLoss(nn.Module):
    """`loss_weight` x LPIPS, averaged over the batch. Images: (b, 3, h, w) RGB in [0, 1]; computed in fp32.

    Args:
        loss_weight: weight of the loss (1 in DPMambaIR's extractor pre-training).
        net, weights: the backbone and its file, see `build_lpips`. The paper does not say which backbone it uses.
    """

    def __init__(self, loss_weight: float = 1.0, net: str = 'alex', weights: str | None = None):
        super().__init__()
        self.loss_weight = loss_weight
        self.network = build_lpips(net, weights)

    def train(self, mode: bool = True):
        return super().train(False)  # in train mode the heads would apply dropout

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.loss_weight * self.network(pred.float(), target.float(), normalize=True).mean()
