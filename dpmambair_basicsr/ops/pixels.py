"""Layer norm over channels and depthwise 3x3 convolutions of images in channels_last: which code computes them.

On a GPU on which scans are computed by the backend 'cuda', by kernels from the same place, `selective_scan/cuda`; on a
CPU on which they are computed by 'numba', and without gradients, by kernels of `selective_scan/numba`. Both read and
write the image once for all steps of a function. Where another backend is asked for, or anywhere else, by PyTorch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from dpmambair_basicsr.ops.selective_scan.backend import backend_in_force, get_backend
from dpmambair_basicsr.ops.selective_scan.operators import is_traced

MAX_CHANNELS = 1024  # of a layer norm by a GPU kernel, which keeps a pixel in registers
CPU_CHANNELS = 16  # a vector: the fewest of the CPU kernels; for layer norm c is a multiple


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Of the channels of each pixel: (b, c, h, w), (c,) parameters -> (b, c, h, w) in channels_last.

    Under autocast a GPU kernel gives x's type, PyTorch fp32.
    """
    pixels = x.permute(0, 2, 3, 1)  # a view, not a copy
    if kernels_run(x) and x.shape[1] <= MAX_CHANNELS and _is_affine(norm, x):
        from dpmambair_basicsr.ops.selective_scan.cuda import pixels as kernels

        return kernels.layer_norm(pixels, norm.weight, norm.bias, norm.eps, None).permute(0, 3, 1, 2)
    if _is_affine(norm, x) and cpu_kernels_run(x, norm.weight, norm.bias) and x.shape[1] % CPU_CHANNELS == 0:
        from dpmambair_basicsr.ops.selective_scan.numba import pixels as cpu_kernels

        return cpu_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, None)
    return norm(pixels).permute(0, 3, 1, 2)


def layer_norm_silu_gate(norm: nn.LayerNorm, x: Tensor, gate: Tensor) -> Tensor:
    """`layer_norm(norm, x) * silu(gate)`, (b, c, h, w) each, in the wider of their types."""
    if kernels_run(x, gate) and x.shape[1] <= MAX_CHANNELS and _is_affine(norm, x):
        from dpmambair_basicsr.ops.selective_scan.cuda import pixels as kernels

        x = x.to(torch.promote_types(x.dtype, gate.dtype))
        pixels, gates = x.permute(0, 2, 3, 1), gate.permute(0, 2, 3, 1)
        return kernels.layer_norm(pixels, norm.weight, norm.bias, norm.eps, gates).permute(0, 3, 1, 2)
    fits = _is_affine(norm, x) and x.shape == gate.shape and x.shape[1] % CPU_CHANNELS == 0
    if fits and cpu_kernels_run(x, gate, norm.weight, norm.bias):
        from dpmambair_basicsr.ops.selective_scan.numba import pixels as cpu_kernels

        return cpu_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, gate)
    return layer_norm(norm, x) * F.silu(gate)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, c, h, w) by (c, 1, 3, 3) and (c,), with zeros around the image -> (b, c, h, w); autocast applies."""
    if not (kernels_run(x) and _fit(x, weight, bias)):
        return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    from dpmambair_basicsr.ops.selective_scan.cuda import pixels as kernels

    return kernels.depthwise(_pixels(x), weight, bias).permute(0, 3, 1, 2)


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`silu(depthwise_conv(x, weight, bias))`."""
    if kernels_run(x) and _fit(x, weight, bias):
        from dpmambair_basicsr.ops.selective_scan.cuda import pixels as kernels

        return kernels.depthwise_silu(_pixels(x), weight, bias).permute(0, 3, 1, 2)
    if cpu_kernels_run(x, weight, bias) and x.shape[1] >= CPU_CHANNELS and _fit(x, weight, bias):
        from dpmambair_basicsr.ops.selective_scan.numba import pixels as cpu_kernels

        return cpu_kernels.depthwise_silu(x, weight, bias)
    return F.silu(depthwise_conv(x, weight, bias))


def depthwise_gelu_gate(
    gate: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    value: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
) -> Tensor:
    """`gelu(depthwise_conv(*of gate)) * depthwise_conv(*of value)`; gelu is the exact one."""
    fits = gate.shape == value.shape and _fit(gate, gate_weight, gate_bias) and _fit(value, value_weight, value_bias)
    if fits and kernels_run(gate, value):
        from dpmambair_basicsr.ops.selective_scan.cuda import pixels as kernels

        gates, values = _pixels(gate), _pixels(value)
        gates, values = (x.to(torch.promote_types(gates.dtype, values.dtype)) for x in (gates, values))
        result = kernels.depthwise_gelu_gate(gates, gate_weight, gate_bias, values, value_weight, value_bias)
        return result.permute(0, 3, 1, 2)
    tensors = gate, gate_weight, gate_bias, value, value_weight, value_bias
    if fits and cpu_kernels_run(*tensors) and gate.shape[1] >= CPU_CHANNELS:
        from dpmambair_basicsr.ops.selective_scan.numba import pixels as cpu_kernels

        return cpu_kernels.depthwise_gelu_gate(*tensors)
    return F.gelu(depthwise_conv(gate, gate_weight, gate_bias)) * depthwise_conv(value, value_weight, value_bias)


def kernels_run(x: Tensor, *others: Tensor) -> bool:
    """Whether our GPU kernels compute these images of one size. Not in a trace, in which FLOPs are counted."""
    if is_traced() or x.numel() == 0 or any(other.shape != x.shape for other in others):
        return False
    return all(_kernels_run(image.device, image.dtype) for image in (x, *others))


def cpu_kernels_run(*tensors: Tensor | None) -> bool:
    """Whether our CPU kernels compute these fp32 images and weights: without gradients, autocast, trace or compiler."""
    given = [tensor for tensor in tensors if tensor is not None]
    if is_traced() or torch.compiler.is_compiling() or torch.is_autocast_enabled('cpu'):
        return False
    if any(x.device.type != 'cpu' or x.dtype != torch.float32 or x.numel() == 0 for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    backend = backend_in_force() or get_backend('numba')
    return backend.name == 'numba' and backend.why_unavailable(given[0].device, torch.float32) is None


def is_plain(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether calling the modules does what `kind` does with weight and bias, which kernels may then read instead.

    Pruning, LoRA, offloading, counters and the like replace a module, hook into its call, or give it another `forward`.
    """
    if _has_any_global_hook():
        return False
    for module in modules:
        if type(module) is not kind or 'forward' in module.__dict__ or '_conv_forward' in module.__dict__:
            return False
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
    return True


def _is_affine(norm, x):
    """Whether the norm has the weight and bias that kernels read, one of each a channel; PyTorch judges others."""
    if not is_plain(nn.LayerNorm, norm) or norm.weight is None or norm.bias is None:
        return False
    return norm.weight.shape == norm.bias.shape == x.shape[1:2]


def _fit(x, weight, bias):
    """Whether kernels, which check nothing, can convolve the image; otherwise PyTorch does, or raises."""
    channels = x.shape[1]
    return weight.shape == (channels, 1, 3, 3) and (bias is None or bias.shape == (channels,))


def _pixels(x):
    """(b, c, h, w) -> (b, h, w, c), in autocast's type if that is enabled."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return x.permute(0, 2, 3, 1)


def _kernels_run(device, dtype):
    backend = backend_in_force() or get_backend('cuda')
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and backend.name == 'cuda' and backend.why_unavailable(device, torch.float32) is None


# torch.compile takes the result as it is and does not look inside.
_kernels_run._dynamo_marked_constant = True
