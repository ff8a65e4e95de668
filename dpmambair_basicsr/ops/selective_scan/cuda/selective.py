"""The plain selective scan on NVIDIA GPUs by CUDA kernels: fp32, bf16 and fp16, in any mixture, any strides.

The kernels are the omni scan's. They need the channels of a position side by side, and B and C too: tensors with
another layout are copied first, and y and the gradients of u and delta are returned in the layout of u and delta.
"""

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.cuda.launch import Inputs, backward, forward
from dpmambair_basicsr.ops.selective_scan.cuda.omni import own
from dpmambair_basicsr.ops.selective_scan.cuda.plan import MAX_STATES, states_shape
from dpmambair_basicsr.ops.selective_scan.operators import differentiate, keeps_states, operator


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s contract, with B, C (b, g, n, l) and every tensor fp32, bf16 or fp16."""
    if A.shape[1] <= MAX_STATES:
        keep = keeps_states((u, delta, A, B, C, D, delta_bias))
        return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, keep)[0]
    # The output is a sum over the states, so scans of parts of them add up.
    total = torch.zeros((), device=u.device)
    for part in range(0, A.shape[1], MAX_STATES):
        states = slice(part, part + MAX_STATES)
        parts = A[:, states], B[:, :, states], C[:, :, states], D if part == 0 else None
        total = total + scan(u.float(), delta, *parts, delta_bias, delta_softplus)
    return total.to(u.dtype)


def _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus):
    groups, length = B.shape[1], u.shape[2]
    bias, A, D = (_parameter(x, u) for x in (delta_bias, A, D))
    projected = torch.cat([B, C], dim=2).flatten(1, 2).mT.contiguous()  # (b, l, g * 2n)
    x, delta, directions = u.mT.contiguous(), delta.mT.contiguous(), (0,) * groups
    return Inputs(x, delta, projected, None, bias.view(groups, -1), A, D, directions, (1, length), delta_softplus)


def _parameter(x, u):
    return u.new_zeros(u.shape[1], dtype=torch.float32) if x is None else x.float().contiguous()


def _empty_like(x):
    """An empty (b, d, l), dense, in x's order of d and l."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).mT if channels_last else x.new_empty(x.shape)


def _as_laid_out(pixels, x):
    """(b, l, d) in the layout of `_empty_like(x)`."""
    target = _empty_like(x)
    return pixels.mT if target.stride() == pixels.mT.stride() else target.copy_(pixels.mT)


@operator('selective_scan_cuda')
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
    """Return y and, if `keep`, the states that `_backward` starts from."""
    y, states = forward(_inputs(u, delta, A, B, C, D, delta_bias, delta_softplus), keep)
    return _as_laid_out(y, u), states


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    b, d, length = u.shape
    groups = B.shape[1]
    states = states_shape(b, d // groups, length, groups, A.shape[1]) if keep else (0,)
    return _empty_like(u), u.new_empty(states, dtype=torch.float32)


@operator('selective_scan_cuda_backward')
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
    """Return the gradients of the seven tensors, in their types; for those that are None, in fp32, to be ignored."""
    inputs = _inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    found = backward(inputs, states, dy.mT.contiguous())
    dB, dC = found.projected.mT.unflatten(1, (B.shape[1], -1)).chunk(2, dim=2)  # (b, g, n, l)
    return (
        _as_laid_out(found.x, u),
        _as_laid_out(found.delta, delta),
        own(found.A, A),
        own(dB, B),
        own(dC, C),
        own(found.D, found.D if D is None else D),
        own(found.dt_bias.flatten(), found.dt_bias if delta_bias is None else delta_bias),
    )


@_backward.register_fake
def _(u, delta, A, B, C, D, delta_bias, states, dy, delta_softplus):
    contiguous = (x.new_empty(x.shape) for x in (A, B, C))
    channels = (u.new_empty(u.shape[1], dtype=torch.float32 if x is None else x.dtype) for x in (D, delta_bias))
    return _empty_like(u), _empty_like(delta), *contiguous, *channels


differentiate(_forward, _backward, 7)
