"""fwd and bwd, common to Mamba's and VMamba's CUDA extensions, implemented with our scan on any device.

Callers use them in their own autograd.Function, which saves the results of `forward` for `backward`.
"""

from typing import Any

import torch
from torch import Tensor

from dpmambair_basicsr.ops import selective_scan
from dpmambair_basicsr.ops.selective_scan.forms import repeat_to


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus: bool, out_float: bool = False) -> list[Tensor]:
    """[y, x] or, with the gate z, [y, x, y * silu(z)]; y in u's type, or fp32 if out_float.

    x, (b, d, 1, 2 n), is the scan's last pair per state: even entries are the product of all exp(delta A), odd ones
    the last state.
    """
    u = u.float() if out_float else u
    y, state = selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, return_last_state=True)
    step = delta.float() if delta_bias is None else delta.float() + delta_bias.float()[:, None]
    step = torch.nn.functional.softplus(step) if delta_softplus else step
    product = torch.exp(repeat_to(step.sum(-1, keepdim=True), 1, len(A)) * A.float())
    x = torch.stack([product, state], dim=-1).flatten(-2).unsqueeze(2)
    gated = [] if z is None else [(y.float() * torch.nn.functional.silu(z.float())).to(y.dtype)]
    return [y, x, *gated]


def backward(u, delta, A, B, C, D, z, delta_bias, dout, delta_softplus: bool) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias, dz], None for missing tensors; the scan is recomputed."""
    given_or_none = u, delta, A, B, C, D, delta_bias, z
    tensors: list[Any] = [None if x is None else x.detach().requires_grad_() for x in given_or_none]
    given = [x for x in tensors if x is not None]
    with torch.enable_grad():
        u, delta, A, B, C, D, delta_bias, z = tensors
        y = selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, z=z)
        gradients = iter(torch.autograd.grad(y, given, dout.to(y.dtype)))
    return [None if x is None else next(gradients) for x in tensors]
