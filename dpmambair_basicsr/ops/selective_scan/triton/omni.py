"""The omni scan on NVIDIA GPUs by Triton's kernels, fused: fp32, bf16 and fp16, mixed as they come, any size.

One direction after the other is scanned where the pixels are, channels_last, and added to what the others gave. Only
its projections, r + 2n numbers per pixel, are laid out in its order, since all channels read them, state by state. Step
sizes are computed from the low-rank ones in the kernels and not stored. Results are bitwise reproducible.

Extra memory, in fp32 and units of x: (r + 2n) / d for one direction's projections; n / 128 per direction for the states
that the backward pass starts from; while that runs, the gradients and (r + 2n) / 16 for sums of those of one
direction's projections. For half types, y and the gradient of x are summed in fp32 first.

The kernels are selective.py's, and so is what it says about tests and about tiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.operators import differentiate, keeps_states
from dpmambair_basicsr.ops.selective_scan.triton.selective import (
    COMPILER_OPTIONS,
    Plan,
    contiguous,
    load_kernels,
    power_of_2,
    sample_view,
    tile_view,
    view,
)

# The tiles of `add_parts`.
_LINES, _POSITIONS = 32, 64


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
    """The sum of the scans of projected images.

    Args:
        x: (b, h * w, d).
        projected: (b, h * w, k * (r + 2n)), per direction low-rank step sizes, B and C.
        dt_weight, dt_bias, A, D: see `omni_scan`; A may be each sample's own.
        directions: k of them.
        size: (h, w).

    Returns:
        (b, h * w, d), in x's type.
    """
    inputs = x, projected, dt_weight, dt_bias, A, D
    return _forward(*inputs, list(directions), *size, keeps_states(inputs))[0]


def _pixels(x, direction, height, width):
    """(b, h * w, channels) as a tile's tuple (b, channels, l), read in this direction."""
    batch, line, channel = x.stride()
    step = line
    if direction in (2, 3):
        x, step = x[:, -1], -step
    if direction in (0, 2):
        return x, batch, channel, step, None, 0
    return x, batch, channel, width * step, height, step


class _Scans:
    """What both passes share: per direction parameters and projections, and one plan."""

    def __init__(self, x, projected, dt_weight, dt_bias, A, D, directions, height, width):
        self.x, self.projected, self.directions, self.size = x, projected, directions, (height, width)
        self.k, self.d, self.rank = dt_weight.shape
        self.n = A.shape[-1]
        self.columns = self.rank + 2 * self.n
        rates = [sample_view(part) for part in A.chunk(self.k, dim=-2)]
        self.parameters = list(zip(rates, D.chunk(self.k), dt_weight, dt_bias, strict=True))
        self.lines = x.new_empty(len(x), 1, self.columns, x.shape[1], dtype=projected.dtype)
        self.plan = Plan(x.mT, self.lines[:, :, : self.n], self.rank)

    def project(self, order):
        """Lay out one direction's projections, low-rank step sizes, B and C, (b, 1, r | n | n, l); as tuples."""
        start = order * self.columns
        source = self.projected[..., start : start + self.columns]
        self.add_parts(self.pixels(source, order), tile_view(self.lines.squeeze(1)), 1)
        return (view(part) for part in self.lines.split([self.rank, self.n, self.n], dim=2))

    def pixels(self, x, order):
        """x (b, h * w, ..) as a tile's tuple, in one direction's order."""
        return _pixels(x, self.directions[order], *self.size)

    def add_parts(self, source, target, parts):
        """Sum lines of projections (parts * b, r + 2n, l) over parts into (b, r + 2n, l), both tiles' tuples."""
        length = self.plan.length
        T = min(_POSITIONS, power_of_2(length))
        rows = min(_LINES, power_of_2(self.columns))
        grid = -(-length // T), -(-self.columns // rows), self.plan.b
        sizes = parts, self.columns, length
        load_kernels().add_parts[grid](source, target, *sizes, ROWS=rows, T=T, **COMPILER_OPTIONS)


def _states(x, dt_weight, A):
    """The shape of one state per direction and chunk."""
    return len(dt_weight), *Plan(x.mT, x.new_empty(len(x), 1, A.shape[-1], 1)).states


@torch.library.custom_op('dpmambair_basicsr::omni_scan_triton', mutates_args=())
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
    """The sum of the scans, and the states that `_backward` starts from, if `keep`."""
    x, *parameters = contiguous(x, dt_weight, dt_bias, A, D)
    scans = _Scans(x, projected, *parameters, directions, height, width)
    plan, y = scans.plan, torch.empty_like(x, dtype=torch.float32)
    states = y.new_empty(scans.k if keep else 1, *plan.states)
    with torch.cuda.device_of(x):
        for order, (A, D, dt, bias) in enumerate(scans.parameters):
            delta, B, C = scans.project(order)
            pixels, starts = scans.pixels(x, order), states[order if keep else 0]
            plan.find_starts(starts, pixels, delta, B, A, dt, bias, True, adjoint=False)
            inputs = pixels, delta, A, B, C, D, dt, bias, starts
            plan.run(load_kernels().outputs, *inputs, scans.pixels(y, order), SOFTPLUS=True, ACCUMULATE=order > 0)
    return y.to(x.dtype), states if keep else states.new_empty(0)


@_forward.register_fake
def _(x, projected, dt_weight, dt_bias, A, D, directions, height, width, keep):
    states = _states(x, dt_weight, A) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(states, dtype=torch.float32)


@torch.library.custom_op('dpmambair_basicsr::omni_scan_triton_backward', mutates_args=())
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
    """The gradients of the first six, in their types."""
    types = [tensor.dtype for tensor in (dt_weight, dt_bias, A, D)]
    x, *parameters = contiguous(x, dt_weight, dt_bias, A, D)
    scans = _Scans(x, projected, *parameters, directions, height, width)
    plan, n, rank = scans.plan, scans.n, scans.rank
    dx = torch.empty_like(x, dtype=torch.float32)
    dprojected = projected.new_empty(projected.shape)
    dlines = dx.new_empty(plan.blocks * plan.b, scans.columns, plan.length)
    dlow, dB, dC = dlines.split([rank, n, n], dim=1)
    sums = dx.new_empty(n + 2 + rank, plan.b * plan.chunks, plan.d)
    dparameters = dx.new_empty(scans.k, n + 2 + rank, plan.d)
    own = A.dim() == 3  # each sample its own
    dA_of_samples = dx.new_empty(scans.k, n, plan.b, plan.d) if own else None
    adjoints = torch.empty_like(states[0])
    with torch.cuda.device_of(x):
        for order, (rates, D, dt, bias) in enumerate(scans.parameters):
            delta, B, C = scans.project(order)
            pixels, g_y = scans.pixels(x, order), scans.pixels(dy, order)
            plan.find_starts(adjoints, g_y, delta, C, rates, dt, bias, True, adjoint=True)
            inputs = pixels, delta, rates, B, C, D, dt, bias, states[order], g_y, adjoints
            results = scans.pixels(dx, order), tile_view(dlow), dB, dC, sums
            plan.run(load_kernels().gradients, *inputs, *results, SOFTPLUS=True, ACCUMULATE=order > 0)
            start = order * scans.columns
            target = scans.pixels(dprojected[..., start : start + scans.columns], order)
            scans.add_parts(tile_view(dlines), target, plan.blocks)
            torch.sum(sums, 1, out=dparameters[order])
            if own:
                torch.sum(sums[:n].unflatten(1, (plan.b, plan.chunks)), 2, out=dA_of_samples[order])
    dA, dD, dbias, dweight = dparameters.split([n, 1, 1, rank], dim=1)
    dA = dA_of_samples.permute(2, 0, 3, 1).flatten(1, 2) if own else dA.mT.flatten(0, 1)
    results = dweight.mT, dbias[:, 0], dA, dD.flatten()
    results = (result.to(dtype, copy=True).contiguous() for result, dtype in zip(results, types, strict=True))
    return dx.to(x.dtype), dprojected, *results


@_backward.register_fake
def _(x, projected, dt_weight, dt_bias, A, D, states, dy, directions, height, width):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, projected, dt_weight, dt_bias, A, D))


differentiate(_forward, _backward, 6)
