"""Selective scan of an image along several directions, summed: VmambaIR's omni and DPMambaIR's prompt selective scan.

Shapes: b batch, d channels, h, w height and width, l = h * w, k = len(directions), r rank of delta, n states.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmambair_basicsr.ops.cross_scan import DIRECTIONS, cross_merge, cross_scan
from dpmambair_basicsr.ops.selective_scan import selective_scan
from dpmambair_basicsr.ops.selective_scan.backend import choose_fused, chosen
from dpmambair_basicsr.ops.selective_scan.operators import is_traced


def omni_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    directions: Sequence[int] = DIRECTIONS,
    backend: str | None = None,
) -> Tensor:
    """Project each pixel to delta, B and C, scan along each direction, and sum the results at each pixel.

    Projections act on single pixels, so their order does not matter. Where possible, the image is therefore projected
    once and the scans index its pixels: no sequences are written, reversed or merged, and only the low-rank step sizes
    are stored. `scan_by_sequences` is the definition.

    Args:
        x: (b, d, h, w), not empty; channels_last needs fewer copies.
        x_proj_weight: (k, r + 2n, d), or (b, k, r + 2n, d), one per sample; to low-rank delta, B and C.
        dt_proj_weight: (k, d, r), from low-rank delta to delta.
        dt_proj_bias: (k, d), added to delta before softplus.
        A: (k * d, n), negative, or (b, k * d, n), one per sample.
        D: (k * d,).
        directions: k scan orders, see `cross_scan`.
        backend: as in `selective_scan`. 'cuda' and, if everything is fp32, 'numba' have a fused kernel; the others
            scan sequences.

    Returns:
        (b, d, h, w), in x's type.

    Raises:
        ValueError: a direction is unknown or a shape does not match.
        BackendError: the backend is unknown or not available here.
    """
    parameters = x_proj_weight, dt_proj_weight, dt_proj_bias, A, D
    _check(x, *parameters, directions)
    # FLOPs are counted on a trace, and those inside our operator would be missing.
    one_device = all(parameter.device == x.device for parameter in parameters)
    name = None
    if one_device and not is_traced():
        name = choose_fused(backend, x.device, *(tensor.dtype for tensor in (x, *parameters)))
    if name is None:
        return scan_by_sequences(x, *parameters, directions, backend)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (b, l, d)
    projected = pixels @ x_proj_weight.flatten(-3, -2).mT  # (b, l, k * (r + 2n))
    y = chosen[name].omni_scan(pixels, projected, *parameters[1:], directions, x.shape[2:])
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def scan_by_sequences(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    directions: Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """`omni_scan` step by step: read the image in each direction, project, scan, merge."""
    xs = cross_scan(x, directions)  # (b, k, d, l)
    rank, n = dt_proj_weight.shape[2], A.shape[-1]
    delta, B, C = torch.matmul(x_proj_weight, xs).split([rank, n, n], dim=2)  # (b, k, r | n | n, l)
    delta = torch.matmul(dt_proj_weight, delta)  # (b, k, d, l)
    ys = selective_scan(
        xs.flatten(1, 2),
        delta.flatten(1, 2),
        A,
        B,
        C,
        D,
        dt_proj_bias.flatten(),
        delta_softplus=True,
        backend=backend,
    )
    return cross_merge(ys.view_as(xs), x.shape[2:], directions)


def _check(x, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, directions):
    """Raise a one-line ValueError naming the first argument with a wrong shape."""
    if not directions or any(direction not in DIRECTIONS for direction in directions):
        raise ValueError(f'omni_scan: directions must be one or more of {DIRECTIONS}, got {directions!r}')
    if x.dim() != 4 or not x.numel():
        raise ValueError(f'omni_scan: x must be (b, d, h, w), not empty, got {tuple(x.shape)}')
    b, d, k = x.shape[0], x.shape[1], len(directions)
    rank, n = dt_proj_weight.shape[-1], A.shape[-1]
    weight = (k, rank + 2 * n, d)
    expected = {
        'x_proj_weight': (x_proj_weight, (b, *weight) if x_proj_weight.dim() == 4 else weight),
        'dt_proj_weight': (dt_proj_weight, (k, d, rank)),
        'dt_proj_bias': (dt_proj_bias, (k, d)),
        'A': (A, (b, k * d, n) if A.dim() == 3 else (k * d, n)),
        'D': (D, (k * d,)),
    }
    for name, (parameter, shape) in expected.items():
        if parameter.shape != shape:
            raise ValueError(f'omni_scan: {name} must be {shape}, got {tuple(parameter.shape)}')
