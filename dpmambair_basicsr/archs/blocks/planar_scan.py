"""Selective scan of an image along one, two or four directions.

Shapes: B batch, D channels, H W height width, L = H*W, K directions, R rank of delta, N states.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmambair_basicsr.ops import omni_scan


class PlanarScan(nn.Module):
    """Base of the OSS (VmambaIR) and the DPSS module (DPMambaIR): K selective scans and their parameters.

    The parameters belong to the module itself, as in the published checkpoints:
    `x_proj_weight` (K, R + 2N, D), `dt_projs_weight` (K, D, R), `dt_projs_bias` (K, D), `A_logs` (K*D, N), `Ds` (K*D,).
    Initialisation is Mamba's: A = -(1..N) in each channel, D = 1, step sizes log-uniform in [1e-3, 1e-1].

    Args:
        channels: D.
        d_state: N.
        dt_rank: R.
        directions: scan orders, see `cross_scan`: 0 rows, 1 columns, 2 and 3 the same reversed.
    """

    def __init__(self, channels: int, d_state: int, dt_rank: int, directions: Sequence[int]):
        super().__init__()
        self.directions = tuple(directions)
        k = len(self.directions)
        self.x_proj_weight = nn.Parameter(torch.empty(k, dt_rank + 2 * d_state, channels))
        nn.init.uniform_(self.x_proj_weight, -(channels**-0.5), channels**-0.5)  # as nn.Linear
        self.dt_projs_weight = nn.Parameter(torch.empty(k, channels, dt_rank))
        nn.init.uniform_(self.dt_projs_weight, -(dt_rank**-0.5), dt_rank**-0.5)
        self.dt_projs_bias = nn.Parameter(log_uniform_delta_bias(k, channels))
        self.A_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(k * channels, 1))
        self.Ds = nn.Parameter(torch.ones(k * channels))

    def scan(self, x: Tensor, prompt: Tensor | None = None, delta_scale: Tensor | None = None) -> Tensor:
        """Sum of the K scans of x.

        Args:
            x: (B, D, H, W).
            prompt: (B, R + 2N), each sample's factors of the low-rank delta, B and C; None for 1.
            delta_scale: (B,), not negative, each sample's factor of delta, after softplus; None for 1.

        Returns:
            (B, D, H, W).
        """
        return directional_scan(
            x,
            self.directions,
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
            prompt,
            delta_scale,
        )


def directional_scan(
    x: Tensor,
    directions: Sequence[int],
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    prompt: Tensor | None = None,
    delta_scale: Tensor | None = None,
) -> Tensor:
    """Project each pixel to delta, B and C, scan along each direction, sum the results.

    delta_scale is folded into A and B, since s delta A = delta (s A) and s delta B u = delta (s B) u.

    Args:
        x: (B, D, H, W).
        directions: K scan orders, see `cross_scan`.
        x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds: see `PlanarScan`.
        prompt, delta_scale: see `PlanarScan.scan`.

    Returns:
        (B, D, H, W); fp32 under autocast, since exp amplifies the rounding of step sizes.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # else the second fails
        parameters = x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds
        with torch.autocast(kind, enabled=False):
            return directional_scan(x.float(), directions, *parameters, prompt, delta_scale)
    A = -torch.exp(A_logs)
    if delta_scale is not None:
        rank, n = dt_projs_weight.shape[2], A.shape[1]
        of_B = F.pad(delta_scale[:, None].expand(-1, n), (rank, n), value=1.0)  # (B, R + 2N)
        prompt = of_B if prompt is None else prompt * of_B
        A = A * delta_scale[:, None, None]  # (B, K * D, N)
    if prompt is not None:  # scales rows of weights instead of outputs: nothing of size L is touched
        x_proj_weight = x_proj_weight * prompt[:, None, :, None]  # (B, K, R + 2N, D)
    return omni_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, directions)


def log_uniform_delta_bias(*shape: int, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """Biases whose softplus is log-uniform in [low, high], Mamba's initial step sizes."""
    delta = torch.exp(torch.empty(shape).uniform_(math.log(low), math.log(high)))
    return delta + torch.log(-torch.expm1(-delta))  # inverse of softplus
