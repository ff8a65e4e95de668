"""Selective scan on the CPU by numba kernels: fp32, any size and strides.

A unit of work is a block of 16 channels of a sample in the forward pass, a few blocks of a group in the backward pass;
see `runtime`.

Both passes are PyTorch operators, opaque to torch.compile and torch.export. Extra memory: n / 64 of u for the states
that the backward pass starts from, the gradients, and a buffer whose size does not depend on l.
"""

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

# The backward pass has at least this many units (as many threads can be busy), if there are as many blocks.
_BACKWARD_UNITS = 16
# Each unit of a group sums dB and dC separately. After this many positions the sums are added up and their memory is
# reused.
_BACKWARD_POSITIONS = 8192

_KERNELS = 'selective_kernels'


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s contract, with B, C (b, g, n, l) and every tensor fp32 on the CPU."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    return _forward(*inputs, delta_softplus, keeps_states(inputs))[0]


def _layout(u, B):
    """The kernels' sizes (groups, channels per group, n, l), the blocks of a group and the chunks of l."""
    groups, n, length = B.shape[1:]
    width = u.shape[1] // groups
    return (groups, width, n, length), -(-width // LANES), -(-length // CHUNK)


def _results(u, B, keep):
    """Allocate the results of `_forward`."""
    (groups, _, n, _), blocks, chunks = _layout(u, B)
    states = (u.shape[0], groups * blocks, chunks, n, LANES) if keep else (0,)
    return torch.empty_like(u), u.new_empty(states)


@operator('selective_scan_numba', 'cpu')
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return y, in the layout of u, and, if `keep`, the states that `_backward` starts from."""
    kernels = load_kernels(_KERNELS)
    sizes, blocks, _ = _layout(u, B)
    y, states = _results(u, B, keep)
    parameters = _pack(A, D, delta_bias, sizes[0])
    inputs = sizes, delta_softplus, view(u), view(delta), parameters.data_ptr(), view(B), view(C)
    arguments = *inputs, view(y), states.data_ptr() if keep else 0
    units = u.shape[0] * sizes[0] * blocks
    run(kernels.forward, arguments, units, u.numel() * B.shape[2], kernels.forward_scratch(B.shape[2]))
    return y, states


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    return _results(u, B, keep)


@operator('selective_scan_numba_backward', 'cpu')
def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    dy: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the seven tensors; D and delta_bias count as zeros where they are None."""
    kernels = load_kernels(_KERNELS)
    sizes, blocks, chunks = _layout(u, B)
    b, (groups, _, n, length) = u.shape[0], sizes
    rows = b * groups * n
    parameters = _pack(A, D, delta_bias, groups)
    dparameters = parameters.new_zeros(b, *parameters.shape)
    adjoints = u.new_zeros(b, groups * blocks, n, LANES)
    du, ddelta, dB, dC = torch.empty_like(u), torch.empty_like(delta), B.new_empty(B.shape), C.new_empty(C.shape)
    parts = min(blocks, -(-_BACKWARD_UNITS // (b * groups)))
    window = chunks if parts == 1 else min(chunks, _BACKWARD_POSITIONS // CHUNK)
    if parts == 1:
        sums = dB.view(1, rows, length), dC.view(1, rows, length)
    else:
        sums = B.new_empty(2, parts, rows, window * CHUNK).unbind()
    arguments = (
        *(sizes, delta_softplus, view(u), view(delta), parameters.data_ptr(), view(B), view(C), view(dy)),
        *(states.data_ptr(), view(du), view(ddelta), dparameters.data_ptr(), adjoints.data_ptr()),
        *(view(sums[0]), view(sums[1]), parts),
    )
    for last in range(chunks, 0, -window):
        first = max(0, last - window)
        work = 2 * u.numel() * n * (last - first) // chunks  # a backward step costs as much as two forward
        run(kernels.backward, (*arguments, first, last), b * groups * parts, work, kernels.backward_scratch(n))
        if parts > 1:
            positions = slice(first * CHUNK, min(length, last * CHUNK))
            for source, target in zip(sums, (dB, dC), strict=True):
                add_parts(source, target.view(rows, length)[:, positions])
    total = torch.empty_like(parameters)
    add_parts(dparameters.flatten(2), total.flatten(1))
    dA, dD, ddelta_bias = unpack(total, groups, sizes[1], (n, 1, 1))
    return du, ddelta, dA, dB, dC, dD.view(-1), ddelta_bias.view(-1)


@_backward.register_fake
def _(u, delta, A, B, C, D, delta_bias, states, dy, delta_softplus):
    d = u.shape[1]
    contiguous = (x.new_empty(x.shape) for x in (A, B, C))
    return torch.empty_like(u), torch.empty_like(delta), *contiguous, u.new_empty(d), u.new_empty(d)


differentiate(_forward, _backward, 7)


def _pack(A, D, delta_bias, groups):
    zeros = A.new_zeros(len(A))
    columns = zeros if D is None else D, zeros if delta_bias is None else delta_bias
    return pack(torch.cat([A * LOG2_E, *(x.unsqueeze(1) for x in columns)], dim=1), groups)
