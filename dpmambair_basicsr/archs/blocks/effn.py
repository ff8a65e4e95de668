from torch import Tensor, nn
from torch.nn import functional as F


class EFFN(nn.Module):
    """Efficient feed-forward network of VmambaIR (Sec. 3.4), the gated GDFN of Restormer (Eq. 3 there).

    project_in -> 3x3 depthwise convolution -> gelu(first half) * second half -> project_out; (b, c, h, w) -> same.

    Args:
        channels: c.
        expansion: hidden width over c; the width is rounded down.
        bias: whether the three convolutions have one.
    """

    def __init__(self, channels: int, expansion: float, bias: bool):
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)
