from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.ops.pixels import depthwise_conv, kernels_run


def convolve_halves(
    conv: nn.Conv2d, first: Tensor, second: Tensor | None = None, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """The two halves of conv's output channels, (b, c, h, w) each, computed separately.

    The halves of a single channels_last result would be strided views, on which the following elementwise functions run
    several times slower.

    Args:
        conv: ungrouped, or depthwise, 3x3 with zeros around the image.
        first: the input; for a depthwise convolution its first half.
        second: its second half, for a depthwise convolution.
        width: c, at least half of conv's output channels; the rest is zeros. Default: half of them.
    """
    width = width or conv.out_channels // 2
    weights = extended_halves(conv.weight, width)
    biases = (None, None) if conv.bias is None else extended_halves(conv.bias, width)
    inputs = (first, first if second is None else second)
    one, other = (
        F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)
        if second is None
        else depthwise_conv(x, weight, bias)
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    return one, other


def convolve_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)` of a depthwise 3x3 convolution that keeps the size."""
    return depthwise_conv(x, conv.weight, conv.bias) if kernels_run(x) else conv(x)


def extended_halves(parameter: Tensor, width: int) -> tuple[Tensor, ...]:
    """(2c, ...) -> two of (width, ...), padded with zeros."""
    missing = width - len(parameter) // 2
    halves = parameter.chunk(2)
    return tuple(F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) for x in halves) if missing else halves
