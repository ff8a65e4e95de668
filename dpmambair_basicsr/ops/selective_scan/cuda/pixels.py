"""Layer norm over channels and depthwise 3x3 convolutions on NVIDIA GPUs: fp32, bf16, fp16; sums in fp32, no atomics.

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

_POINTERS = [(name, ctypes.c_void_p) for name in ('x', 'dy', 'out', 'weight', 'bias', 'parts')]


class Pixels(ctypes.Structure):
    """The struct of layer_norm.cu."""

    _fields_ = [*_POINTERS, ('pixels', ctypes.c_longlong), ('eps', ctypes.c_float)]


class Image(ctypes.Structure):
    """The struct of depthwise.cu."""

    _fields_ = [*_POINTERS, *((name, ctypes.c_int) for name in ('batch', 'height', 'width', 'channels', 'blocks'))]


def layer_norm_constants(channels: int, dtype: torch.dtype) -> tuple[tuple[str, int | str], ...]:
    return ('BYTES', ctypes.sizeof(Pixels)), ('C', channels), ('TX', TYPES[dtype]), ('WARPS', WARPS)


def depthwise_constants(dtype: torch.dtype) -> tuple[tuple[str, int | str], ...]:
    return ('BYTES', ctypes.sizeof(Image)), ('STRIP', STRIP), ('TX', TYPES[dtype]), ('WARPS', WARPS)


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
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Over the last dimension, up to `ops.pixels.MAX_CHANNELS`; in x's type, also under autocast."""
    x, weight, bias = x.contiguous(), weight.float().contiguous(), bias.float().contiguous()
    channels, pixels, out = x.shape[-1], x.numel() // x.shape[-1], torch.empty_like(x)
    arguments, constants = Pixels(pixels=pixels, eps=eps), layer_norm_constants(channels, x.dtype)
    grid, tensors = min(_warps(pixels), 8 * BLOCKS), {'x': x, 'out': out, 'weight': weight, 'bias': bias}
    _launch('layer_norm', 'layer_norm_outputs', constants, arguments, grid, x.device, **tensors)
    return out


@layer_norm.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


@operator('layer_norm_cuda_backward')
def _layer_norm_backward(x: Tensor, weight: Tensor, dy: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; of the latter two in fp32."""
    x, weight, dy = x.contiguous(), weight.float().contiguous(), dy.contiguous()
    channels, pixels, out = x.shape[-1], x.numel() // x.shape[-1], torch.empty_like(x)
    grid = min(_warps(pixels), BLOCKS)
    parts = torch.empty((grid, 2, channels), dtype=torch.float32, device=x.device)
    arguments, constants = Pixels(pixels=pixels, eps=eps), layer_norm_constants(channels, x.dtype)
    tensors = {'x': x, 'dy': dy, 'out': out, 'weight': weight, 'parts': parts}
    _launch('layer_norm', 'layer_norm_gradients', constants, arguments, grid, x.device, **tensors)
    dweight, dbias = parts.sum(0)
    return out, dweight, dbias.clone()


@_layer_norm_backward.register_fake
def _(x, weight, dy, eps):
    return x.new_empty(x.shape), *(weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))


def _save_layer_norm(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.bias_type = bias.dtype
    ctx.save_for_backward(x, weight)


def _differentiate_layer_norm(ctx, dy):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _layer_norm_backward(x, weight, dy, ctx.eps)
    return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_type), None


layer_norm.register_autograd(_differentiate_layer_norm, setup_context=_save_layer_norm)


# --- depthwise convolution


@operator('depthwise_cuda')
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, h, w, c) with (c, 1, 3, 3) and (c,), zeros around the image -> (b, h, w, c), in x's type."""
    x, (b, h, w, c), out = x.contiguous(), x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight = weight.float().flatten(1).mT.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    arguments, constants = Image(batch=b, height=h, width=w, channels=c), depthwise_constants(x.dtype)
    grid, tensors = -(-c // 32) * -(-w // STRIP) * _warps(h) * b, {'x': x, 'out': out, 'weight': weight, 'bias': bias}
    _launch('depthwise', 'depthwise_outputs', constants, arguments, grid, x.device, **tensors)
    return out


@depthwise.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape)


@operator('depthwise_cuda_weight_gradients')
def _depthwise_weight_gradients(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(c, 1, 3, 3) and (c,), fp32."""
    (b, h, w, c), x, dy = x.shape, x.contiguous(), dy.contiguous()
    groups = -(-c // 32)
    blocks = min(_warps(b * h), max(1, BLOCKS // groups))
    parts = torch.empty((blocks, 10, c), dtype=torch.float32, device=x.device)
    arguments, constants = Image(batch=b, height=h, width=w, channels=c, blocks=blocks), depthwise_constants(x.dtype)
    tensors = {'x': x, 'dy': dy, 'parts': parts}
    _launch('depthwise', 'depthwise_weight_gradients', constants, arguments, groups * blocks, x.device, **tensors)
    sums = parts.sum(0)
    return sums[:9].mT.reshape(c, 1, 3, 3).contiguous(), sums[9].clone()


@_depthwise_weight_gradients.register_fake
def _(x, dy):
    c = x.shape[-1]
    return x.new_empty((c, 1, 3, 3), dtype=torch.float32), x.new_empty((c,), dtype=torch.float32)


def _save_depthwise(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.bias_type = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _differentiate_depthwise(ctx, dy):
    x, weight = ctx.saved_tensors
    dx = depthwise(dy, weight.flip(2, 3), None) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:]):
        return dx, None, None
    dweight, dbias = _depthwise_weight_gradients(x, dy)
    return dx, dweight.to(weight.dtype), None if ctx.bias_type is None else dbias.to(ctx.bias_type)


depthwise.register_autograd(_differentiate_depthwise, setup_context=_save_depthwise)
