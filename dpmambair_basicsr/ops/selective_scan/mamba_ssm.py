"""Selective scan by the CUDA kernels of the package mamba_ssm (state-spaces/mamba), on request only: for comparison.

Their constraints, met here by conversions: A, D and delta_bias are real fp32; u, delta, B and C share one type, fp32,
bf16 or fp16; l is contiguous. n is at most 256, and a tensor has fewer than 2^32 elements. The backward pass sums dB
and dC with atomics, so these are not bitwise reproducible. Written against its source (version 2.2), not run.
"""

import functools

import torch

name, reads_half, omni_scan = 'mamba_ssm', True, None


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s contract, with B, C (b, g, n, l) and every tensor fp32, bf16 or fp16."""
    if A.shape[1] > 256:
        raise ValueError(f'selective_scan: backend mamba_ssm supports up to n = 256 states, got {A.shape[1]}')
    u, delta, B, C = (x.to(u.dtype).contiguous() for x in (u, delta, B, C))
    A, D, delta_bias = (None if x is None else x.float().contiguous() for x in (A, D, delta_bias))
    return _function()(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus)


def why_unavailable(device, dtype):
    """Why it cannot run on this device in this type; None if it can."""
    if device.type != 'cuda' or dtype != torch.float32:
        return f'it computes float32 on CUDA GPUs, not {str(dtype).removeprefix("torch.")} on {device.type}'
    return _trouble()


@functools.cache
def _trouble():
    try:
        _function()
    except Exception as error:  # any: an extension built for another PyTorch fails in many ways
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())  # on one line
        advice = 'MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm'
        return f'mamba_ssm does not work ({reason}); it needs nvcc and `{advice}`'
    return None


@functools.cache
def _function():
    import selective_scan_cuda  # noqa: F401  (recent versions of mamba_ssm import without it, and then cannot scan)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn
