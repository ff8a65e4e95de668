"""Fused omni scan on NVIDIA GPUs by CUDA kernels: fp32, bf16 and fp16, in any mixture, any size.

A thread scans one channel of a chunk of a direction, reading pixels in place, channels_last. Projections, r + 2n
numbers per pixel, are read by all channels of a block from shared memory; step sizes are computed from the low-rank
ones and not stored. Two directions that read the same lines from both ends share a launch. Results are bitwise
reproducible.

Extra memory, in fp32 and units of x: n / 16 per direction for the states that the backward pass starts from; n / T
per direction, T up to 128, for those between the chunks. For half types, y and the gradient of x are summed in fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.cuda.launch import Inputs, backward, forward, shape_of_states
from dpmambair_basicsr.ops.selective_scan.cuda.plan import MAX_ORDERS, MAX_STATES
from dpmambair_basicsr.ops.selective_scan.operators import differentiate, keeps_states, operator


def omni_scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    directions: Sequence[int],
    size: tuple[int, int],
) -> Tensor:
    """Sum the scans of projected images over the directions.

    Args:
        x: (b, h * w, d).
        projected: (b, h * w, k * (r + 2n)), per direction low-rank step sizes, B and C.
        dt_weight, dt_bias, A, D: see `omni_scan`; A may be one per sample.
        directions: k scan orders, up to 8.
        size: (h, w).

    Returns:
        (b, h * w, d), in x's type.

    Raises:
        ValueError: too many directions, or too little shared memory for n and r.
    """
    if len(directions) > MAX_ORDERS:
        raise ValueError(f'omni_scan: backend cuda supports up to {MAX_ORDERS} directions, got {len(directions)}')
    n = A.shape[-1]
    if n <= MAX_STATES:
        keep = keeps_states((x, projected, dt_weight, dt_bias, A, D))
        return _forward(x, projected, dt_weight, dt_bias, A, D, list(directions), size[0], size[1], keep)[0]
    # The output is a sum over the states, so scans of parts of them add up.
    rank, k = dt_weight.shape[2], len(directions)
    low, B, C = projected.unflatten(-1, (k, rank + 2 * n)).split([rank, n, n], dim=-1)
    total = torch.zeros((), device=x.device)
    for part in range(0, n, MAX_STATES):
        states = slice(part, part + MAX_STATES)
        columns = torch.cat([low, B[..., states], C[..., states]], dim=-1).flatten(-2)
        parameters = dt_weight, dt_bias, A[..., states], D if part == 0 else torch.zeros_like(D)
        total = total + omni_scan(x.float(), columns, *parameters, directions, size)
    return total.to(x.dtype)


def _inputs(x, projected, dt_weight, dt_bias, A, D, directions, size):
    dt_weight, dt_bias, A, D = (tensor.float().contiguous() for tensor in (dt_weight, dt_bias, A, D))
    x, projected = x.contiguous(), projected.contiguous()
    return Inputs(x, None, projected, dt_weight, dt_bias, A, D, tuple(directions), size)


@operator('omni_scan_cuda')
def _forward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    directions: Sequence[int],
    height: int,
    width: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the scans and, if `keep`, the states that `_backward` starts from."""
    return forward(_inputs(x, projected, dt_weight, dt_bias, A, D, directions, (height, width)), keep)


@_forward.register_fake
def _(x, projected, dt_weight, dt_bias, A, D, directions, height, width, keep):
    inputs = Inputs(x, None, projected, dt_weight, dt_bias, A, D, tuple(directions), (height, width))
    states = shape_of_states(inputs) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(states, dtype=torch.float32)


@operator('omni_scan_cuda_backward')
def _backward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    dy: Tensor,
    directions: Sequence[int],
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the first six arguments, in their types."""
    inputs = _inputs(x, projected, dt_weight, dt_bias, A, D, directions, (height, width))
    found = backward(inputs, states, dy.contiguous())
    return (
        found.x,
        found.projected,
        own(found.dt_weight, dt_weight),
        own(found.dt_bias, dt_bias),
        own(found.A, A),
        own(found.D, D),
    )


def own(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's type, in its own memory."""
    return gradient.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(x, projected, dt_weight, dt_bias, A, D, states, dy, directions, height, width):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, projected, dt_weight, dt_bias, A, D))


differentiate(_forward, _backward, 6)
