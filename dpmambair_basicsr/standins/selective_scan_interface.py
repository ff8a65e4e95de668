"""mamba_ssm.ops.selective_scan_interface: its signatures, our scan. (b batch, d channels, l positions, n states.)"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dpmambair_basicsr.ops import selective_scan
from dpmambair_basicsr.standins.causal_conv1d import causal_conv1d_fn

__all__ = ['mamba_inner_fn', 'mamba_inner_ref', 'selective_scan_fn', 'selective_scan_ref']


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.selective_scan`, with the gate z before delta_bias as in mamba_ssm.

    The last state is differentiable; in mamba_ssm it is not.
    """
    return selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, z=z, return_last_state=return_last_state)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` by the definition, position by position."""
    return selective_scan(
        u, delta, A, B, C, D, delta_bias, delta_softplus, 'reference', z=z, return_last_state=return_last_state
    )


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    scan=selective_scan_fn,
) -> Tensor:
    """A Mamba block between its first and its last projection (Mamba, figure 3), differentiable in every tensor.

    Args:
        xz: (b, 2 d, l), the sequence and its gate.
        conv1d_weight: (d, 1, width); conv1d_bias: (d,).
        x_proj_weight: (r + n + n, d), to delta of rank r, and to B and C, each unless it is given.
        delta_proj_weight: (d, r); out_proj_weight: (features, d); out_proj_bias: (features,).
        A: (d, n); B, C: None, or as in `ops.selective_scan`; D, delta_bias: (d,).
        B_proj_bias, C_proj_bias: (n,), added to the projected B and C.
        checkpoint_lvl: no effect; autograd keeps what it needs.
        b_rms_weight, c_rms_weight: (n,), dt_rms_weight: (d,): if given, B, C and delta are normalised (RMSNorm).

    Returns:
        (b, l, features).
    """
    rank, n = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation='silu')
    projected = torch.matmul(x_proj_weight, x)  # (b, r + n + n, l)
    delta = torch.matmul(delta_proj_weight, projected[:, :rank])
    if B is None:
        B = add_and_normalise(projected[:, rank : rank + n], B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    if C is None:
        C = add_and_normalise(projected[:, -n:], C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    delta = add_and_normalise(delta, None, dt_rms_weight, b_c_dt_rms_eps)
    y = scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def add_and_normalise(x: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """(b, features, l): adds the bias, then applies RMSNorm over the features, each if given."""
    if bias is not None:
        x = x + bias.to(x.dtype)[:, None]
    if weight is not None:
        x = F.rms_norm(x.transpose(1, 2), weight.shape, weight.to(x.dtype), eps).transpose(1, 2)
    return x


# `mamba_inner_fn` by the definition, position by position.
mamba_inner_ref = partial(mamba_inner_fn, scan=selective_scan_ref)
