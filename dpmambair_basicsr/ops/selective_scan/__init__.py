"""The selective scan of Mamba (Gu & Dao 2023, section 3.2, algorithm 2): one signature, several backends.

A backend is a module of this package, imported when first asked for, with two functions:

- `scan(u, delta, A, B, C, D, delta_bias, delta_softplus) -> y`, the contract of `selective_scan` for checked arguments:
  B and C are (b, g, n, l); every tensor has one type, fp32 or fp64, but for those in `READ_HALF` each its own, fp32,
  bf16 or fp16; tensors need not be contiguous;
- `why_not(device, dtype) -> str | None`: what keeps it from running there and what to install; None if it can run.

A new one is a file and its line in `BACKENDS`; the tests and `benchmarks/scan.py` find it there.
"""

import functools
import importlib
import logging

import torch
from torch import Tensor

# Name -> module, the best first: backend=None takes the first that can run, so what follows 'torch' runs on request
# only.
BACKENDS = {
    'triton': 'triton.selective',
    'numba': 'numba.selective',
    'torch': 'torch_chunked',
    'reference': 'reference',
    'mamba_ssm': 'mamba_ssm',
}
# These read bf16 and fp16 themselves, half the bytes of fp32; the others get everything in fp32.
READ_HALF = ('triton', 'mamba_ssm')


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
) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t . h_t + D u_t,  h_0 = 0.

    Args:
        u: input, (b, d, l), none of them 0.
        delta: step sizes, (b, d, l); positive after delta_bias and delta_softplus.
        A: (d, n), negative.
        B, C: (b, g, n, l), each shared by the d / g consecutive channels of a group; (b, n, l) means g = 1.
        D: (d,).
        delta_bias: (d,), added to delta.
        delta_softplus: whether delta is then replaced by log(1 + exp(delta)).
        backend: a name in `BACKENDS`; None takes the best one available for u's device and type. Logged once.

    Returns:
        y, (b, d, l), in u's type. The state and all arithmetic are fp32, or fp64 if u is.
        Differentiable in every tensor; once, except for 'reference'.

    Raises:
        ValueError: a shape, type or device does not fit, or there is no backend of that name.
        RuntimeError: the backend is not available here.
    """
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    tensors = {'u': u, 'delta': delta, 'A': A, 'B': B, 'C': C, 'D': D, 'delta_bias': delta_bias}
    _check(**tensors)
    dtype = torch.promote_types(u.dtype, torch.float32)
    name = _choose(backend, u.device, dtype)
    kept = (torch.bfloat16, torch.float16) if name in READ_HALF else ()
    inputs = (x if x is None or x.dtype in kept else x.to(dtype) for x in tensors.values())
    return _scans[name](*inputs, delta_softplus).to(u.dtype)


def available_backends(device: torch.device | str = 'cpu', dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that can compute on this device in this type (torch.float32 or float64), the best first."""
    return [name for name in BACKENDS if _why_not(name, torch.device(device), dtype) is None]


_scans = {}


def _choose(backend, device, dtype):
    if backend is None:
        backend = next(name for name in BACKENDS if _why_not(name, device, dtype) is None)
    elif backend not in BACKENDS:
        raise ValueError(f'selective_scan: no backend {backend!r}; choose from {", ".join(BACKENDS)}')
    elif reason := _why_not(backend, device, dtype):
        available = ', '.join(available_backends(device, dtype))
        raise RuntimeError(
            f'selective_scan: backend {backend!r} is not available: {reason}. Available here: {available}'
        )
    _log_once(backend, device.type)
    _scans[backend] = _module(backend).scan
    return backend


# torch.compile takes its result as it is and does not look inside. torch.compiler.assume_constant_result does just
# this, but imports the compiler, which takes a second.
_choose._dynamo_marked_constant = True


def _why_not(backend, device, dtype):
    return _module(backend).why_not(device, dtype)


@functools.cache
def _module(backend):
    return importlib.import_module(f'{__name__}.{BACKENDS[backend]}')


@functools.cache
def _log_once(backend, device_type):
    logging.getLogger('basicsr').info('selective_scan: backend %r on %s', backend, device_type)


def _check(u, delta, A, B, C, D, delta_bias):
    """Raise a one-line ValueError that names the first argument that does not fit."""
    if u.dim() != 3 or not u.numel():
        raise ValueError(f'selective_scan: u must be (b, d, l), not empty, got {tuple(u.shape)}')
    b, d, length = u.shape
    if A.dim() != 2 or A.shape[0] != d:
        raise ValueError(f'selective_scan: A must be (d, n) with d = {d} as in u, got {tuple(A.shape)}')
    groups = B.shape[1] if B.dim() == 4 else 1
    expected = {
        'delta': (delta, (b, d, length)),
        'B': (B, (b, groups, A.shape[1], length)),
        'C': (C, (b, groups, A.shape[1], length)),
        'D': (D, (d,)),
        'delta_bias': (delta_bias, (d,)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f'selective_scan: {name} must be {shape} to fit u, A and B, got {tuple(x.shape)}')
    if d % groups:
        raise ValueError(f'selective_scan: d = {d} channels of u do not divide into the {groups} groups of B')
    for name, x in {'u': u, 'delta': delta, 'A': A, 'B': B, 'C': C, 'D': D, 'delta_bias': delta_bias}.items():
        if x is not None and (x.device != u.device or not x.is_floating_point()):
            raise ValueError(
                f'selective_scan: {name} must be real floating point on {u.device}, got {x.dtype} on {x.device}'
            )
