import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.archs.blocks.split_conv import convolve_halves, gate_depthwise, is_depthwise, is_pointwise

# On a CPU, a channels_last depthwise convolution of 127 or 255 channels takes twice as long as one of 128 or 256.
CHANNELS_MULTIPLE = 8


class EFFN(nn.Module):
    """Efficient feed-forward network of VmambaIR (Sec. 4.2.2), the gated GDFN of Restormer (Eq. 2 there).

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
        if not (is_pointwise(self.project_in) and is_depthwise(self.dwconv) and is_pointwise(self.project_out)):
            gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
            return self.project_out(F.gelu(gate) * value)
        hidden = self.project_out.in_channels
        # Not in a trace, on which FLOPs are counted.
        missing = -hidden % CHANNELS_MULTIPLE if x.device.type == 'cpu' and not torch.jit.is_tracing() else 0
        gate, value = convolve_halves(self.project_in, x, width=hidden + missing)
        weight = F.pad(self.project_out.weight, (0, 0, 0, 0, 0, missing)) if missing else self.project_out.weight
        return F.conv2d(gate_depthwise(self.dwconv, gate, value), weight, self.project_out.bias)
