"""mamba_ssm.modules.mamba_simple.Mamba with the same arguments and parameter names, and our scan."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dpmambair_basicsr.standins.selective_scan_interface import mamba_inner_fn

__all__ = ['Mamba']


class Mamba(nn.Module):
    """The Mamba block (Gu & Dao 2023, section 3.4) as in mamba_ssm; checkpoints are interchangeable.

    Args:
        d_model: features of the sequence.
        d_state: n, states of a channel.
        d_conv: width of the causal convolution.
        expand: channels of the scan over d_model.
        dt_rank: rank of the step sizes; 'auto' for ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: bounds of the initial step sizes, which are log-uniform.
        dt_init: 'random' (uniform) or 'constant' weights of the projection to step sizes, at most
            dt_scale / sqrt(rank).
        conv_bias, bias: whether the convolution and the linear layers have one.
        use_fast_path: no effect, there is only one path.
        layer_idx: stored, no effect.

    Raises:
        NotImplementedError: arguments that forks of mamba_ssm have added (bimamba_type, nslices, if_divide_out, ...).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = 'auto',
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = 'random',
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        **of_forks,
    ):
        if of_forks:
            names = ', '.join(of_forks)
            raise NotImplementedError(
                f"Mamba: the stand-in of dpmambair_basicsr has the arguments of mamba_ssm's, not {names}"
            )
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == 'auto' else int(dt_rank)
        here: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **here)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **here
        )
        self.activation, self.act = 'silu', nn.SiLU()
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **here)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **here)
        limit = dt_scale * self.dt_rank**-0.5
        if dt_init == 'constant':
            nn.init.constant_(self.dt_proj.weight, limit)
        elif dt_init == 'random':
            nn.init.uniform_(self.dt_proj.weight, -limit, limit)
        else:
            raise NotImplementedError(f'Mamba: dt_init must be constant or random, got {dt_init!r}')
        step = torch.empty(self.d_inner, **here).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        step = step.clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.dt_proj.bias._no_reinit = True
        states = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(states.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **here)

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        """(b, l, d_model) -> the same.

        Raises:
            NotImplementedError: inference_params, mamba_ssm's cache for token-by-token decoding.
        """
        if inference_params is not None:
            raise NotImplementedError('Mamba: the stand-in of dpmambair_basicsr does not cover inference_params')
        xz = self.in_proj(hidden_states).transpose(1, 2)
        return mamba_inner_fn(
            xz,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            -torch.exp(self.A_log.float()),
            D=self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
        )
