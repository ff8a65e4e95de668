"""causal_conv1d's functions implemented with PyTorch's convolution; signatures of version 1.5."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['causal_conv1d_fn', 'causal_conv1d_ref', 'causal_conv1d_update']


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution, optionally followed by SiLU.

    Args:
        x: (b, d, l).
        weight: (d, width).
        bias: (d,).
        initial_states: (b, d, width - 1), the positions before x; zeros if None.
        activation: None, 'silu' or 'swish'.

    Returns:
        (b, d, l) in x's type; on request, also the last width - 1 positions, (b, d, width - 1).

    Raises:
        NotImplementedError: seq_idx (several sequences in one).
    """
    if activation not in (None, 'silu', 'swish'):
        raise NotImplementedError(f'causal_conv1d_fn: activation must be None, silu or swish, got {activation!r}')
    if seq_idx is not None:
        raise NotImplementedError('causal_conv1d_fn: the stand-in of dpmambair_basicsr does not cover seq_idx')
    before = weight.shape[1] - 1
    x = F.pad(x, (before, 0)) if initial_states is None else torch.cat([initial_states.to(x.dtype), x], dim=2)
    y = F.conv1d(x, weight.to(x.dtype).unsqueeze(1), None if bias is None else bias.to(x.dtype), groups=len(weight))
    y = y if activation is None else F.silu(y)
    if not return_final_states:
        return y
    final = x[:, :, x.shape[2] - before :]
    return y, final.clone() if final_states_out is None else final_states_out.copy_(final)


causal_conv1d_ref = causal_conv1d_fn


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_fn` for the next position or positions, x (b, d) or (b, d, l); conv_state, the preceding ones
    (b, d, at least width - 1), is updated in place.

    Raises:
        NotImplementedError: cache_seqlens and conv_state_indices (circular and shared buffers).
    """
    for name, value in {'cache_seqlens': cache_seqlens, 'conv_state_indices': conv_state_indices}.items():
        if value is not None:
            raise NotImplementedError(f'causal_conv1d_update: the stand-in of dpmambair_basicsr does not cover {name}')
    sequence = x if x.dim() == 3 else x.unsqueeze(2)
    known = torch.cat([conv_state, sequence.to(conv_state.dtype)], dim=2)
    recent = known[:, :, known.shape[2] - sequence.shape[2] - weight.shape[1] + 1 :].to(x.dtype)
    conv_state.copy_(known[:, :, -conv_state.shape[2] :])
    before, new = recent.split([weight.shape[1] - 1, sequence.shape[2]], dim=2)
    y = causal_conv1d_fn(new, weight, bias, initial_states=before, activation=activation)
    return y if x.dim() == 3 else y.squeeze(2)
