from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.ops.pixels import depthwise_conv, depthwise_gelu_gate, depthwise_silu, is_plain, kernels_run

POINTWISE = (1, 1), (0, 0), (1, 1), (1, 1), 'zeros'  # see `settings`
DEPTHWISE = (3, 3), (1, 1), (1, 1), (1, 1), 'zeros'


def convolve_halves(conv: nn.Module, x: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """The two halves of conv's output channels, (b, c, h, w) each, computed separately.

    The halves of a single channels_last result would be strided views, on which the following elementwise functions run
    several times slower.

    Args:
        conv: a 1x1 convolution, or any module in its place.
        width: c, at least half of conv's output channels; the rest is zeros; then conv has to be plain. Default: half.
    """
    if not isinstance(conv, nn.Conv2d) or (width is None and not is_pointwise(conv)):
        return conv(x).chunk(2, dim=1)
    parameters = parameter_halves(conv, width or conv.out_channels // 2)
    one, other = (F.conv2d(x, weight, bias) for weight, bias in parameters)
    return one, other


def gate_depthwise(conv: nn.Conv2d, gate: Tensor, value: Tensor) -> Tensor:
    """gelu(gate's convolution) * value's: (b, c, h, w) each -> same.

    Args:
        conv: depthwise, 3x3, that keeps the size; its first half of channels is for gate, the second for value; c may
            be more than half of them: its parameters are padded with zeros.
    """
    of_gate, of_value = parameter_halves(conv, gate.shape[1])
    return depthwise_gelu_gate(gate, *of_gate, value, *of_value)


def silu_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`F.silu(conv(x))` of a depthwise 3x3 convolution that keeps the size."""
    return depthwise_silu(x, conv.weight, conv.bias) if is_depthwise(conv) else F.silu(conv(x))


def convolve_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)` of a depthwise 3x3 convolution that keeps the size."""
    return depthwise_conv(x, conv.weight, conv.bias) if kernels_run(x) and is_depthwise(conv) else conv(x)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether it is a plain 1x1 convolution, see `is_plain`."""
    return is_plain(nn.Conv2d, conv) and conv.groups == 1 and settings(conv) == POINTWISE


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether it is a plain depthwise 3x3 convolution that keeps the size, with zeros around the image."""
    return (
        is_plain(nn.Conv2d, conv)
        and conv.groups == conv.in_channels == conv.out_channels
        and settings(conv) == DEPTHWISE
    )


def settings(conv: nn.Conv2d) -> tuple:
    return conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.padding_mode


def parameter_halves(conv: nn.Conv2d, width: int) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of the two halves of conv's output channels, padded with zeros to `width` channels each."""
    biases = (None, None) if conv.bias is None else extended_halves(conv.bias, width)
    return list(zip(extended_halves(conv.weight, width), biases, strict=True))


def extended_halves(parameter: Tensor, width: int) -> tuple[Tensor, ...]:
    """(2c, ...) -> two of (width, ...), padded with zeros."""
    missing = width - len(parameter) // 2
    halves = parameter.chunk(2)
    return tuple(F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) for x in halves) if missing else halves
