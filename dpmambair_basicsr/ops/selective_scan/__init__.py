"""The selective scan of Mamba (Gu & Dao 2023, section 3.2, algorithm 2): one signature, several backends.

`backend.py` defines what a backend is and how one is chosen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.backend import (
    BACKENDS,
    Backend,
    BackendError,
    available_backends,
    choose,
    chosen,
    use_backend,
)
from dpmambair_basicsr.ops.selective_scan.forms import common_form, samples_as_groups, with_states_at_the_end

__all__ = ['BACKENDS', 'Backend', 'BackendError', 'available_backends', 'selective_scan', 'use_backend']


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str | None = None,
    *,
    z: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t . h_t + D u_t,  h_0 = 0.

    Args:
        u: input, (b, d, l), not empty.
        delta: step sizes, (b, d, l), or (b, m, l), each shared by d / m consecutive channels; positive after delta_bias
            and delta_softplus.
        A: (d, n), negative, or (b, d, n), one per sample.
        B, C: (b, g, n, l), each shared by the d / g consecutive channels of a group; (b, n, l) means g = 1; (d, n) is
            constant over positions and samples (this costs as much memory as g = d).
        D: (d,).
        delta_bias: (d,), or (m,) as in delta, added to delta.
        delta_softplus: whether to replace delta by log(1 + exp(delta)) after that.
        backend: a name in `BACKENDS`; None: the one selected by `use_backend`, the option `scan_backend` or the
            environment variable DPMAMBAIR_SCAN_BACKEND, else the best one available for u's device and type. Logged
            once.
        z: a gate, (b, d, l); y is multiplied by silu(z).
        return_last_state: whether to return h_l too.

    Returns:
        y, (b, d, l), in u's type; and h_l, (b, d, n), if requested. The state and all arithmetic are fp32, or fp64 if u
        is.
        Differentiable in every tensor; once, except for 'reference'.

    Raises:
        ValueError: a shape, type or device does not match.
        BackendError: the backend is unknown or not available here.
    """
    if u.dim() != 3 or not u.numel():
        raise ValueError(f'selective_scan: u must be (b, d, l), not empty, got {tuple(u.shape)}')
    length = u.shape[-1]
    if A.is_complex():
        raise ValueError('selective_scan: A must be real; complex A, as in S4D, is not covered')
    delta, B, C, delta_bias = common_form(u, delta, B, C, delta_bias)
    tensors = {'u': u, 'delta': delta, 'A': A, 'B': B, 'C': C, 'D': D, 'delta_bias': delta_bias}
    _check(**tensors, z=z)
    if A.dim() == 3:
        tensors = samples_as_groups(**tensors)
    dtype = torch.promote_types(u.dtype, torch.float32)
    running = chosen[choose(backend, u.device, dtype)]
    kept = (torch.bfloat16, torch.float16) if running.reads_half else ()
    inputs = [x if x is None or x.dtype in kept else x.to(dtype) for x in tensors.values()]
    if return_last_state:
        inputs = with_states_at_the_end(*inputs, delta_softplus)
    y = running.scan(*inputs, delta_softplus)
    y = y.reshape(*u.shape[:2], -1)
    y, state = y[..., :length], y[..., length:]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state.to(dtype)) if return_last_state else y


def _check(u, delta, A, B, C, D, delta_bias, z):
    """Raise a one-line ValueError naming the first argument whose shape, type or device does not match."""
    b, d, length = u.shape
    if A.shape[:-1] != ((b, d) if A.dim() == 3 else (d,)):
        raise ValueError(
            f'selective_scan: A must be (d, n) or (b, d, n) with b, d = {b}, {d} as in u, got {tuple(A.shape)}'
        )
    n, groups = A.shape[-1], B.shape[1] if B.dim() == 4 else 1
    expected = {
        'delta': (delta, (b, d, length)),
        'B': (B, (b, groups, n, length)),
        'C': (C, (b, groups, n, length)),
        'D': (D, (d,)),
        'delta_bias': (delta_bias, (d,)),
        'z': (z, (b, d, length)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f'selective_scan: {name} must be {shape} to fit u, A and B, got {tuple(x.shape)}')
    if d % groups:
        raise ValueError(f'selective_scan: d = {d} channels of u do not divide into the {groups} groups of B')
    for name, x in {'u': u, 'delta': delta, 'A': A, 'B': B, 'C': C, 'D': D, 'delta_bias': delta_bias, 'z': z}.items():
        if x is not None and (x.device != u.device or not x.is_floating_point()):
            raise ValueError(
                f'selective_scan: {name} must be real floating point on {u.device}, got {x.dtype} on {x.device}'
            )
