"""The definition of the selective scan, one position after another. Every other backend must agree with it."""

import torch
import torch.nn.functional as F

from dpmambair_basicsr.ops.selective_scan.forms import repeat_to

name, reads_half, omni_scan = 'reference', False, None


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s formula, step by step. Gradients of any order come from autograd."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (repeat_to(x, 1, u.shape[1]) for x in (B, C))  # (b, d, n, l)
    h = u.new_zeros(*u.shape[:2], A.shape[1])  # (b, d, n)
    y = []
    # unbind: the gradient of indexing with t would be a full-size tensor for every t, hence quadratic in l
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(-1) for x in (u, delta, B, C)), strict=True):
        delta_t = delta_t.unsqueeze(-1)
        h = torch.exp(delta_t * A) * h + delta_t * B_t * u_t.unsqueeze(-1)
        y.append((C_t * h).sum(-1))
    y = torch.stack(y, dim=-1)
    return y if D is None else y + D[:, None] * u


def why_unavailable(device, dtype):
    """It runs everywhere."""
    return None
