"""Fused omni scan on the CPU by numba kernels: fp32, any size.

Both passes are PyTorch operators, opaque to torch.compile and torch.export. Extra memory: n / 64 of x per direction for
the states that the backward pass starts from, the gradients, and, for fewer than 8 images, partial sums: of outputs if
there are few channels, and of the gradients of the projections, one direction at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.numba.runtime import (
    CHUNK,
    LANES,
    LOG2_E,
    add_parts,
    load_kernels,
    pack,
    run,
    unpack,
    view,
)
from dpmambair_basicsr.ops.selective_scan.operators import differentiate, keeps_states, operator

_KERNELS = 'omni_kernels'
# Minimum number of units, and thus of busy threads, if there are enough blocks and directions. If there are too few
# samples, some directions' outputs, or some blocks' gradients of projections, are first summed separately.
_UNITS = 8


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
        x: (b, h * w, d), fp32 on the CPU.
        projected: (b, h * w, k * (r + 2n)), per direction low-rank step sizes, B and C; rounded under autocast.
        dt_weight, dt_bias, A, D: see `omni_scan`; A may be one per sample.
        directions: k scan orders.
        size: (h, w).

    Returns:
        (b, h * w, d).
    """
    inputs = x, projected.to(x.dtype), dt_weight, dt_bias, A, D
    return _forward(*inputs, list(directions), *size, keeps_states(inputs))[0]


def _layout(x, dt_weight, A):
    """Return k, d, n, r and the number of blocks."""
    k, d, rank = dt_weight.shape
    return k, d, A.shape[-1], rank, -(-d // LANES)


def _results(x, dt_weight, A, keep):
    """Allocate the results of `_forward`."""
    k, _, n, _, blocks = _layout(x, dt_weight, A)
    states = (len(x), k, blocks, -(-x.shape[1] // CHUNK), n, LANES) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(states)


def _pack(dt_weight, dt_bias, A, D):
    """Pack all parameters for the kernels, (samples, k * blocks, n + 2 + r, 16); one sample if A is shared."""
    A = LOG2_E * (A if A.dim() == 3 else A.unsqueeze(0))
    shared = D.unsqueeze(1), dt_bias.reshape(-1, 1), dt_weight.flatten(0, 1)
    columns = torch.cat([A, *(x.expand(len(A), -1, -1) for x in shared)], dim=2)
    return pack(columns.flatten(0, 1), len(A) * len(dt_weight)).unflatten(0, (len(A), -1))


def _bytes_per_sample(parameters):
    return 0 if len(parameters) == 1 else 4 * parameters.stride(0)


@operator('omni_scan_numba', 'cpu')
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
    kernels = load_kernels(_KERNELS)
    x, projected, orders = x.contiguous(), projected.contiguous(), torch.tensor(directions)
    y, states = _results(x, dt_weight, A, keep)
    parameters = _pack(dt_weight, dt_bias, A, D)
    b, (k, d, n, rank, blocks) = len(x), _layout(x, dt_weight, A)
    teams = next((teams for teams in range(1, k) if k % teams == 0 and b * blocks * teams >= _UNITS), k)
    ys = y.new_empty(teams, *y.shape) if teams > 1 else y
    arguments = (
        *((b, k, d, n, rank, height, width), orders.data_ptr(), x.data_ptr(), projected.data_ptr()),
        *(parameters.data_ptr(), _bytes_per_sample(parameters), ys.data_ptr(), states.data_ptr() if keep else 0, teams),
    )
    scratch = kernels.forward_scratch(n, rank, blocks)
    run(kernels.forward, arguments, b * teams * blocks, k * x.numel() * n, scratch)
    if teams > 1:
        add_parts(ys.flatten(1, 2), y.flatten(0, 1))
    return y, states


@_forward.register_fake
def _(x, projected, dt_weight, dt_bias, A, D, directions, height, width, keep):
    return _results(x, dt_weight, A, keep)


@operator('omni_scan_numba_backward', 'cpu')
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
    """Return the gradients of the first six arguments."""
    kernels = load_kernels(_KERNELS)
    x, projected, dy = x.contiguous(), projected.contiguous(), dy.contiguous()
    parameters = _pack(dt_weight, dt_bias, A, D)
    (b, length, d), (k, _, n, rank, blocks) = x.shape, _layout(x, dt_weight, A)
    columns = rank + 2 * n
    dx, dprojected = torch.empty_like(x), torch.empty_like(projected)
    dparameters = parameters.new_zeros(b, *parameters.shape[1:])
    parts = min(blocks, -(-_UNITS // b))
    sums = x.new_empty(parts, b * length, columns) if parts > 1 else None
    for order, direction in enumerate(directions):
        target = dprojected.view(b * length, k, columns)[:, order]
        part = target.unsqueeze(0) if parts == 1 else sums
        arguments = (
            *((b, k, d, n, rank, height, width), order, direction, x.data_ptr(), projected.data_ptr()),
            *(parameters.data_ptr(), _bytes_per_sample(parameters), dy.data_ptr(), states.data_ptr(), dx.data_ptr()),
            *(*view(part)[:3], dparameters.data_ptr(), parts),
        )
        # a backward step costs as much as two forward
        run(kernels.backward, arguments, b * parts, 2 * x.numel() * n, kernels.backward_scratch(n, rank, blocks))
        if parts > 1:
            add_parts(sums, target)
    total = torch.empty_like(dparameters[0])
    add_parts(dparameters.flatten(2), total.flatten(1))
    dA, dD, dbias, dweight = unpack(total, k, d, (n, 1, 1, rank))
    if A.dim() == 3:
        dA = unpack(dparameters.flatten(0, 1), b * k, d, (n, 2 + rank))[0].view(A.shape)
    return dx, dprojected, dweight.view(k, d, rank), dbias.view(k, d), dA, dD.view(-1)


@_backward.register_fake
def _(x, projected, dt_weight, dt_bias, A, D, states, dy, directions, height, width):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, projected, dt_weight, dt_bias, A, D))


differentiate(_forward, _backward, 6)
