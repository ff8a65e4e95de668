"""Depthwise 3x3 convolutions and layer norm with what follows them, on the CPU: fp32, without gradients.

PyTorch reads and writes the image for each step; all of them were a third of a network's time.
"""

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.numba.runtime import load_kernels, run

_KERNELS = 'pixel_kernels'


@torch.library.custom_op('dpmambair_basicsr::layer_norm_numba', mutates_args=(), device_types='cpu')
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None) -> Tensor:
    """Over c, a multiple of 16, times silu(gate): (b, c, h, w) -> (b, c, h, w) in channels_last."""
    x, gate = _dense(x), None if gate is None else _dense(gate)
    weight, bias, y = weight.contiguous(), bias.contiguous(), torch.empty_like(x)
    channels, addresses = x.shape[1], [tensor.data_ptr() for tensor in (x, weight, bias)]
    arguments = channels, *addresses, eps, 0 if gate is None else gate.data_ptr(), y.data_ptr()
    run(load_kernels(_KERNELS).layer_norm, arguments, x.numel() // channels, x.numel())
    return y


@torch.library.custom_op('dpmambair_basicsr::depthwise_silu_numba', mutates_args=(), device_types='cpu')
def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(convolution): (b, c, h, w) by (c, 1, 3, 3) and (c,), c >= 16 -> (b, c, h, w) in channels_last."""
    kernels, x = load_kernels(_KERNELS), _dense(x)
    y = torch.empty_like(x)
    tensors = x, *_taps(weight, bias), y
    _run_rows(kernels.depthwise_silu, tensors, kernels.GROUP * x.shape[1])
    return y


@torch.library.custom_op('dpmambair_basicsr::depthwise_gelu_gate_numba', mutates_args=(), device_types='cpu')
def depthwise_gelu_gate(
    gate: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    value: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
) -> Tensor:
    """gelu(convolution of gate) * (convolution of value); shapes as for `depthwise_silu`."""
    kernels, gate, value = load_kernels(_KERNELS), _dense(gate), _dense(value)
    y = torch.empty_like(gate)
    tensors = gate, *_taps(gate_weight, gate_bias), value, *_taps(value_weight, value_bias), y
    _run_rows(kernels.depthwise_gelu_gate, tensors, 2 * kernels.GROUP * gate.shape[1])
    return y


@layer_norm.register_fake
@depthwise_silu.register_fake
@depthwise_gelu_gate.register_fake
def _(x, *_):
    return torch.empty_like(x, memory_format=torch.channels_last)


def _dense(x):
    return x.contiguous(memory_format=torch.channels_last)


def _taps(weight, bias):
    """(c, 1, 3, 3), (c,) -> (9, c), (c,)."""
    return weight.flatten(1).t().contiguous(), weight.new_zeros(len(weight)) if bias is None else bias.contiguous()


def _run_rows(kernel, tensors, scratch):
    batch, channels, height, width = tensors[0].shape
    arguments = (height, width, channels), *(tensor.data_ptr() for tensor in tensors)
    run(kernel, arguments, batch * height, tensors[0].numel(), scratch)
