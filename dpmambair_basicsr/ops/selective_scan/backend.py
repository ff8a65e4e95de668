"""The backends of the selective scan, and how one is chosen.

A backend is any object with the attributes of `Backend`. Ours are modules of this package, imported on first use.
A new one takes a file and a line in `BACKENDS`, where the tests and `benchmarks/scan.py` find it.

The backend is the argument `backend` of a call, else the innermost `use_backend`, else `scan_backend` in the option
file, else the environment variable `DPMAMBAIR_SCAN_BACKEND`, else the best available. A requested backend that cannot
run is an error; no other one takes its place.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

# Name -> module, best first: the first that can run is used, so those after 'torch' run on request only.
BACKENDS = {
    'cuda': 'cuda',
    'numba': 'numba',
    'torch': 'torch_chunked',
    'reference': 'reference',
    'mamba_ssm': 'mamba_ssm',
}
# Names of earlier versions -> their replacements.
RENAMED = {'triton': 'cuda'}
VARIABLE = 'DPMAMBAIR_SCAN_BACKEND'


chosen: 'dict[str, Backend]' = {}  # by name: the backends that have run
_context: 'ContextVar[str | Backend | None]' = ContextVar('scan backend', default=None)
_default: str | None = None


class Backend(Protocol):
    """The interface of a backend.

    Attributes:
        name: as in `BACKENDS`.
        reads_half: whether it reads bf16 and fp16 itself, each tensor in its own type, half the bytes of fp32; other
            backends get all tensors in one type, fp32 or fp64.
        omni_scan: a fused `omni_scan`, without sequences in memory (contract: `numba.omni.omni_scan`); None: images are
            read as sequences for its `scan`.
    """

    name: str
    reads_half: bool
    omni_scan: Callable[..., Tensor] | None

    def why_unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on this device in this type, and what to install; None if it can."""

    def scan(self, u, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor:
        """The contract of `selective_scan` for validated arguments: B and C are (b, g, n, l), with any strides."""


class BackendError(ValueError, RuntimeError):
    """The backend is unknown, or cannot run on this device in this type."""


def available_backends(device: torch.device | str = 'cpu', dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that can run on this device in this type (torch.float32 or float64), best first."""
    device = torch.device(device)
    return [name for name in BACKENDS if get_backend(name).why_unavailable(device, dtype) is None]


@contextmanager
def use_backend(backend: 'str | Backend | None') -> Iterator[None]:
    """Use this backend for all scans in the context, fused or not: `with use_backend('reference'): net(image)`.

    Applies to the current thread, or asyncio task, only; contexts nest. Code compiled by torch.compile keeps the
    backend of its first call.

    Args:
        backend: a name in `BACKENDS`, or a backend of your own under a name of its own; None: no change.

    Raises:
        BackendError: the backend is unknown. Whether it can run is checked by the first scan.
    """
    backend = _current(backend, 'use_backend')
    token = _context.set(_context.get() if backend is None else backend)
    try:
        yield
    finally:
        _context.reset(token)


def set_default_backend(name: str | None) -> None:
    """Set the process-wide default, the option `scan_backend`; None: the best available.

    Raises:
        BackendError: the backend is unknown.
    """
    global _default
    _default = _current(name, 'scan_backend')


def check_backend(backend: str | None, source: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Raise BackendError if the requested backend cannot run; `source` names the option or argument `backend`."""
    if _asked_for(backend, source)[0] is not None:
        _find(backend, source, device, dtype)


def keep_backend(function: Callable) -> Callable:
    """Bind the current `use_backend` to a function, whenever and in whatever thread it is called."""
    backend = _innermost()
    if backend is None:
        return function

    def call(*arguments):
        with use_backend(backend):
            return function(*arguments)

    return call


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name, in `chosen`, of the backend for a call; `backend` is the call's argument. Logs it once."""
    found = _find(backend, 'selective_scan', device, dtype)
    _log_once('selective_scan: backend', found.name, device.type)
    chosen[found.name] = found
    return found.name


def choose_fused(backend: str | None, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """As `choose`, if this backend can scan images of these types fused; otherwise None."""
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    found = _asked_for(backend, 'omni_scan')[0] or _best(device, dtype)
    one_type = found.reads_half or set(dtypes) == {dtype}
    if found.omni_scan is None or not one_type or found.why_unavailable(device, dtype):
        return None
    _log_once('omni_scan: fused, backend', found.name, device.type)
    chosen[found.name] = found
    return found.name


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend of a name in `BACKENDS`."""
    return importlib.import_module(f'dpmambair_basicsr.ops.selective_scan.{BACKENDS[name]}')


def backend_in_force() -> 'Backend | None':
    """What this thread's scans are asked to be computed by; None: the best available."""
    return _asked_for(None, '')[0]


def _innermost():
    return _context.get()


# torch.compile treats their results as constants and does not trace into them.
# torch.compiler.assume_constant_result does the same, but imports the compiler, which takes a second.
choose._dynamo_marked_constant = choose_fused._dynamo_marked_constant = _innermost._dynamo_marked_constant = True


def _find(backend, source, device, dtype) -> Backend:
    found, source = _asked_for(backend, source)
    if found is None:
        return _best(device, dtype)
    if reason := found.why_unavailable(device, dtype):
        available = ', '.join(available_backends(device, dtype))
        raise BackendError(f'{source}: backend {found.name!r} is not available: {reason}. Available here: {available}')
    return found


def _asked_for(backend, source) -> tuple[Backend | None, str]:
    """The requested backend, if any, and what requests it."""
    choices = (
        (backend, source),
        (_context.get(), 'use_backend'),
        (_default, 'scan_backend'),
        (os.environ.get(VARIABLE) or None, VARIABLE),
    )
    backend, source = next((choice for choice in choices if choice[0] is not None), (None, ''))
    backend = _current(backend, source)
    return (get_backend(backend) if isinstance(backend, str) else backend), source


def _best(device, dtype) -> Backend:
    backends = map(get_backend, BACKENDS)
    return next(backend for backend in backends if backend.why_unavailable(device, dtype) is None)


def _current(backend, source):
    """The backend, or its current name."""
    if not isinstance(backend, str):
        return backend
    if backend in RENAMED:
        _log_renamed(source, backend)
        return RENAMED[backend]
    if backend not in BACKENDS:
        raise BackendError(f'{source}: no backend {backend!r}; choose from {", ".join(BACKENDS)}')
    return backend


@functools.cache
def _log_once(what, name, device_type):
    logging.getLogger('basicsr.selective_scan').info('%s %r on %s', what, name, device_type)


@functools.cache
def _log_renamed(source, name):
    text = '%s: backend %r is now %r, which takes its place'
    logging.getLogger('basicsr.selective_scan').info(text, source, name, RENAMED[name])
