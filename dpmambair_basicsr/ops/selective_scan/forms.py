"""Convert the less common forms of the selective scan's inputs and results to the one that the backends take.

Shapes: b batch, d channels, l positions, n states, g groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_NEVER = -1e4  # its softplus, with any bias added, is exactly 0 in every type


def common_form(u, delta, B, C, delta_bias) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Expand delta (b, m, l) and delta_bias (m,), shared by d / m channels, to (b, d, l), (d,); B, C to (b, g, n, l).

    B and C may each be (b, n, l), one group, or (d, n), constant over positions and samples, one group per channel; the
    other one then gets these groups too.
    """
    b, d, length = u.shape
    delta = repeat_to(delta, 1, d)
    delta_bias = None if delta_bias is None else repeat_to(delta_bias, 0, d)
    constant = B.dim() == 2 or C.dim() == 2
    B, C = (_in_groups(x, b, length) for x in (B, C))
    if constant:
        B, C = repeat_to(B, 1, d), repeat_to(C, 1, d)
    return delta, B, C, delta_bias


def repeat_to(x, dim, size):
    """Repeat each entry of x along a dimension so that it has `size` entries; unchanged if `size` is not a multiple."""
    known = x.shape[dim]
    if not known or known == size or size % known:
        return x
    # Not repeat_interleave: in a trace, the count would be a tensor on the CPU, whatever x's device.
    behind = x.shape[dim + 1 :]
    return x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], size // known, *behind).flatten(dim, dim + 1)


def _in_groups(x, b, length):
    if x.dim() == 2:  # one group per channel
        return x[None, :, :, None].expand(b, -1, -1, length)
    return x.unsqueeze(1) if x.dim() == 3 else x


def samples_as_groups(u, delta, A, B, C, D, delta_bias) -> dict[str, Tensor | None]:
    """For A (b, d, n), one per sample: the same scans as b * d channels in b * g groups of a single sample."""
    b = u.shape[0]  # len(u) would fix it in an exported graph
    D, delta_bias = (None if x is None else x.repeat(b) for x in (D, delta_bias))
    u, delta, B, C = (x.flatten(0, 1).unsqueeze(0) for x in (u, delta, B, C))
    return {'u': u, 'delta': delta, 'A': A.flatten(0, 1), 'B': B, 'C': C, 'D': D, 'delta_bias': delta_bias}


def with_states_at_the_end(u, delta, A, B, C, D, delta_bias, delta_softplus: bool):
    """Append n positions, whose outputs are the n entries of the last state.

    Their step sizes are 0, so the state does not change, and C selects one entry at each. Thus any backend can return
    the last state, with its gradient, and the other outputs are bit-identical.
    """
    (b, groups, n, _), d = B.shape, u.shape[1]
    if not delta_softplus and delta_bias is not None:
        delta, delta_bias = delta + delta_bias[:, None], None
    pick = torch.eye(n, dtype=C.dtype, device=C.device).expand(b, groups, n, n)
    u = F.pad(u, (0, n))
    delta = torch.cat([delta, delta.new_full((b, d, n), _NEVER if delta_softplus else 0.0)], dim=2)
    return u, delta, A, F.pad(B, (0, n)), torch.cat([C, pick], dim=3), D, delta_bias
