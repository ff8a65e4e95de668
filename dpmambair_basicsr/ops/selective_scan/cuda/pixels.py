"""Layer norm over channels and depthwise 3x3 convolutions, with the activations and gates that follow, on NVIDIA GPUs.

fp32, bf16, fp16; no atomics. All arithmetic is in fp32: between a convolution or norm and what follows nothing is
rounded to a half type, as it is between PyTorch's operators. Only the inputs are kept for the backward pass, which
computes what lies between again.

PyTorch's are made for other shapes: its layer norm took four times as long as the bytes need, and cuDNN's gradient of
depthwise weights a fifth of a training step (fp32, H100).
"""

import ctypes
import functools

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.cuda.runtime import Kernel, launching_on, load
from dpmambair_basicsr.ops.selective_scan.operators import operator

TYPES = {torch.float32: 'float', torch.bfloat16: 'bf16', torch.float16: 'fp16'}
WARPS, STRIP = 8, 16
BLOCKS = 132 * 8  # of kernels that sum over pixels, at most; a constant: on every GPU the sums have the same order

# What follows the convolution, a function of depthwise.cu, and how many convolutions it takes.
AFTER = {'identity': 1, 'silu': 1, 'silu_gradient': 1, 'gelu_gate': 2, 'gelu_gate_gradients': 2}


def _fields(kind, *names):
    return [(name, kind) for name in names]


class Pixels(ctypes.Structure):
    """The struct of layer_norm.cu."""

    _fields_ = [
        *_fields(ctypes.c_void_p, 'x', 'dy', 'out', 'gate', 'dgate', 'weight', 'bias', 'parts'),
        ('pixels', ctypes.c_longlong),
        ('eps', ctypes.c_float),
    ]


class Image(ctypes.Structure):
    """The struct of depthwise.cu; its pairs are those without and with a 2."""

    _fields_ = [
        *_fields(ctypes.c_void_p, 'x', 'x2', 'weight', 'weight2', 'bias', 'bias2', 'out', 'out2', 'dy', 'parts'),
        *_fields(ctypes.c_int, 'batch', 'height', 'width', 'channels', 'blocks'),
    ]


def layer_norm_constants(channels: int, dtype: torch.dtype, gate: torch.dtype | None) -> tuple:
    types = ('GATE', int(gate is not None)), ('TG', TYPES[gate or dtype]), ('TX', TYPES[dtype])
    return ('BYTES', ctypes.sizeof(Pixels)), ('C', channels), *types, ('WARPS', WARPS)


def depthwise_constants(dtype: torch.dtype, after: str) -> tuple[tuple[str, int | str], ...]:
    follows = ('AFTER', after), ('CONVOLUTIONS', AFTER[after])
    return *follows, ('BYTES', ctypes.sizeof(Image)), ('STRIP', STRIP), ('TX', TYPES[dtype]), ('WARPS', WARPS)


@functools.lru_cache(4096)
def _kernel(file: str, name: str, constants: tuple, device: torch.device) -> Kernel:
    return load(file, constants, device)(name, 32 * WARPS, 0)


def _launch(file, name, constants, arguments, grid, device, **tensors):
    for key, tensor in tensors.items():
        if tensor is not None:
            setattr(arguments, key, tensor.data_ptr())
    with launching_on(device) as stream:
        _kernel(file, name, constants, device)(arguments, grid, stream)


def _warps(rows):
    return -(-rows // WARPS)


# --- layer norm


@operator('layer_norm_cuda')
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None) -> Tensor:
    """Over the last dimension, up to `ops.pixels.MAX_CHANNELS`; times silu(gate); in x's type, also under autocast."""
    x, weight, bias = x.contiguous(), weight.float().contiguous(), bias.float().contiguous()
    gate = None if gate is None else gate.contiguous()
    tensors = {'x': x, 'out': torch.empty_like(x), 'weight': weight, 'bias': bias, 'gate': gate}
    _launch_norm('layer_norm_outputs', min(_warps(_count(x)), 8 * BLOCKS), eps, tensors)
    return tensors['out']


@layer_norm.register_fake
def _(x, weight, bias, eps, gate):
    return x.new_empty(x.shape)


@operator('layer_norm_cuda_backward')
def _layer_norm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, eps: float, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and gate; of the weight and bias in fp32; of no gate it is empty."""
    x, weight, bias, dy = x.contiguous(), weight.float().contiguous(), bias.float().contiguous(), dy.contiguous()
    gate = None if gate is None else gate.contiguous()
    grid, dx, dgate = min(_warps(_count(x)), BLOCKS), torch.empty_like(x), _gradient_of_gate(x, gate)
    parts = torch.empty((grid, 2, x.shape[-1]), dtype=torch.float32, device=x.device)
    tensors = {'x': x, 'dy': dy, 'out': dx, 'weight': weight, 'bias': bias, 'parts': parts}
    _launch_norm('layer_norm_gradients', grid, eps, tensors | {'gate': gate, 'dgate': dgate})
    dweight, dbias = parts.sum(0)
    return dx, dweight, dbias.clone(), dgate


@_layer_norm_backward.register_fake
def _(x, weight, bias, dy, eps, gate):
    dweight, dbias = (weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), dweight, dbias, _gradient_of_gate(x, gate)


def _gradient_of_gate(x, gate):
    return x.new_empty(0) if gate is None else gate.new_empty(gate.shape)


def _count(x):
    return x.numel() // x.shape[-1]


def _launch_norm(name, grid, eps, tensors):
    x, gate = tensors['x'], tensors['gate']
    constants = layer_norm_constants(x.shape[-1], x.dtype, None if gate is None else gate.dtype)
    _launch('layer_norm', name, constants, Pixels(pixels=_count(x), eps=eps), grid, x.device, **tensors)


def _save_layer_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps, gate = inputs
    ctx.save_for_backward(x, weight, bias, gate)


def _differentiate_layer_norm(ctx, dy):
    x, weight, bias, gate = ctx.saved_tensors
    dx, dweight, dbias, dgate = _layer_norm_backward(x, weight, bias, dy, ctx.eps, gate)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None if gate is None else dgate


layer_norm.register_autograd(_differentiate_layer_norm, setup_context=_save_layer_norm)


# --- depthwise convolution: (b, h, w, c) by (c, 1, 3, 3) and (c,), zeros around the image -> (b, h, w, c), in x's type


@operator('depthwise_cuda')
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution alone."""
    return _convolve('identity', 1, x, weight, bias)[0]


@operator('depthwise_silu_cuda')
def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(convolution)."""
    return _convolve('silu', 1, x, weight, bias)[0]


@operator('depthwise_silu_cuda_backward')
def _depthwise_silu_backward(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> Tensor:
    """The gradient of the convolution."""
    return _convolve('silu_gradient', 1, x, weight, bias, dy=dy)[0]


@operator('depthwise_gelu_gate_cuda')
def depthwise_gelu_gate(
    gate: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    value: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
) -> Tensor:
    """gelu(convolution of gate) * (convolution of value)."""
    return _convolve('gelu_gate', 1, gate, gate_weight, gate_bias, value, value_weight, value_bias)[0]


@operator('depthwise_gelu_gate_cuda_backward')
def _depthwise_gelu_gate_backward(
    gate: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    value: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    dy: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the convolutions of gate and of value."""
    tensors = gate, gate_weight, gate_bias, value, value_weight, value_bias
    dgate, dvalue = _convolve('gelu_gate_gradients', 2, *tensors, dy=dy)
    return dgate, dvalue


def _convolve(after, results, *convolutions, dy=None):
    """Launch `depthwise_outputs`; `convolutions`: image, weight and bias of each."""
    tensors: dict[str, Tensor | None] = {'dy': None if dy is None else dy.contiguous()}
    for suffix, i in (('', 0), ('2', 3))[: len(convolutions) // 3]:
        x, weight, bias = convolutions[i : i + 3]
        tensors['x' + suffix] = x.contiguous()
        tensors['weight' + suffix] = weight.float().flatten(1).mT.contiguous()
        tensors['bias' + suffix] = None if bias is None else bias.float().contiguous()
    x = convolutions[0].contiguous()
    outs, (b, h, w, c) = [torch.empty_like(x) for _ in range(results)], x.shape
    tensors |= zip(('out', 'out2'), outs, strict=False)
    arguments, constants = Image(batch=b, height=h, width=w, channels=c), depthwise_constants(x.dtype, after)
    grid = -(-c // 32) * -(-w // STRIP) * _warps(h) * b
    _launch('depthwise', 'depthwise_outputs', constants, arguments, grid, x.device, **tensors)
    return outs


@operator('depthwise_cuda_weight_gradients')
def _depthwise_weight_gradients(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(c, 1, 3, 3) and (c,), fp32."""
    (b, h, w, c), x, dy = x.shape, x.contiguous(), dy.contiguous()
    groups = -(-c // 32)
    blocks = min(_warps(b * h), max(1, BLOCKS // groups))
    parts = torch.empty((blocks, 10, c), dtype=torch.float32, device=x.device)
    arguments = Image(batch=b, height=h, width=w, channels=c, blocks=blocks)
    constants, tensors = depthwise_constants(x.dtype, 'identity'), {'x': x, 'dy': dy, 'parts': parts}
    _launch('depthwise', 'depthwise_weight_gradients', constants, arguments, groups * blocks, x.device, **tensors)
    sums = parts.sum(0)
    return sums[:9].mT.reshape(c, 1, 3, 3).contiguous(), sums[9].clone()


@depthwise.register_fake
@depthwise_silu.register_fake
@_depthwise_silu_backward.register_fake
@depthwise_gelu_gate.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@_depthwise_gelu_gate_backward.register_fake
def _(x, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_depthwise_weight_gradients.register_fake
def _(x, dy):
    c = x.shape[-1]
    return x.new_empty((c, 1, 3, 3), dtype=torch.float32), x.new_empty((c,), dtype=torch.float32)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _convolution_gradients(needed, inputs, dy):
    """Of the inputs: x, weight and bias; None of those not needed."""
    x, weight, bias = inputs
    dx = depthwise(dy, weight.flip(2, 3), None) if needed[0] else None
    if not any(needed[1:]):
        return dx, None, None
    dweight, dbias = _depthwise_weight_gradients(x, dy)
    return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def _differentiate_depthwise(ctx, dy):
    return _convolution_gradients(ctx.needs_input_grad, ctx.saved_tensors, dy)


def _differentiate_silu(ctx, dy):
    dx = _depthwise_silu_backward(*ctx.saved_tensors, dy)
    return _convolution_gradients(ctx.needs_input_grad, ctx.saved_tensors, dx)


def _differentiate_gelu_gate(ctx, dy):
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad
    dgate, dvalue = _depthwise_gelu_gate_backward(*saved, dy)
    of_gate = _convolution_gradients(needed[:3], saved[:3], dgate)
    return *of_gate, *_convolution_gradients(needed[3:], saved[3:], dvalue)


depthwise.register_autograd(_differentiate_depthwise, setup_context=_save_inputs)
depthwise_silu.register_autograd(_differentiate_silu, setup_context=_save_inputs)
depthwise_gelu_gate.register_autograd(_differentiate_gelu_gate, setup_context=_save_inputs)
