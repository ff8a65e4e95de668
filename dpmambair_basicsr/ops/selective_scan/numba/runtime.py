"""Compile the numba kernels on first use, and run them in threads.

The work is divided into units by the shapes alone. Units share nothing and every sum has a fixed order, so results are
bit-identical for any number of threads. The threads are our own; numba's kill a forked process, or abort when two
Python threads call them.
"""

import functools
import importlib
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

LANES = 16  # channels of a block, floats of a vector
CHUNK = 64  # positions whose states are recomputed together
LOG2_E = math.log2(math.e)

# State updates that are worth another thread: about 50 microseconds of work.
_STATES_PER_THREAD = 2**18
# Several runs of units per thread: the others take over from a thread whose core is busy.
_RUNS_PER_THREAD = 4

_pools = {}  # (process, threads) -> ThreadPoolExecutor; never emptied, `threads` takes few values


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on this device in this type; None if they can. A problem of numba is logged once."""
    if device.type != 'cpu' or dtype != torch.float32:
        return f'it computes float32 on a CPU, not {str(dtype).removeprefix("torch.")} on {device.type}'
    return _numba_trouble()


@functools.cache
def _numba_trouble():
    try:
        load_kernels('tiles')  # used by all others, and quick to compile
    except RuntimeError as error:
        _warn_once(f'selective_scan: six times faster on this CPU with numba, but {error}')
        return str(error)
    return None


@functools.cache
def _warn_once(text):
    logging.getLogger('basicsr').warning(text)


@functools.cache
def load_kernels(name: str):
    """The compiled kernels of a module. The first process compiles them, later ones load them from a cache.

    Raises:
        RuntimeError: numba is missing or does not work.
    """
    try:
        with _compiling_is_said():
            return importlib.import_module(f'dpmambair_basicsr.ops.selective_scan.numba.{name}')
    except Exception as error:  # any: numba relies on internals of Python and LLVM, which change between versions
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())  # on one line
        raise RuntimeError(f'numba does not work ({reason}); pip install numba') from error


@contextmanager
def _compiling_is_said():
    from numba.core import event

    class Notice(event.Listener):
        def on_start(self, _):
            _warn_once('selective_scan: compiling the CPU kernels, some 10 s, once')

        def on_end(self, _):
            pass

    with event.install_listener('numba:compile', Notice()):
        yield


def view(x):
    """Address and strides in bytes."""
    return x.data_ptr(), *(4 * stride for stride in x.stride())


def pack(parameters, groups):
    """Pack per-channel parameters (d, m) as the kernels read them: (blocks, m, 16), each group padded with zeros."""
    width = len(parameters) // groups
    padded = parameters.new_zeros(groups, -(-width // LANES) * LANES, parameters.shape[1])
    padded[:, :width] = parameters.unflatten(0, (groups, width))
    return padded.view(-1, LANES, parameters.shape[1]).transpose(1, 2).contiguous()


def unpack(packed, groups, width, columns):
    """Invert `pack`, for d = groups * width; split by columns, each tensor in its own memory."""
    channels = packed.transpose(1, 2).reshape(groups, -1, packed.shape[1])[:, :width].flatten(0, 1)
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in channels.split(columns, dim=1))


def add_parts(source, target):
    """target (rows, columns) = the sum of source (parts, rows, >= columns), in order; columns are contiguous."""
    parts, rows, _ = source.shape
    (_, part_stride, row_stride, _), (start, target_stride, _) = view(source), view(target)
    arguments = parts, source.data_ptr(), part_stride, row_stride, start, target_stride, target.shape[1]
    run(load_kernels('tiles').add_parts, arguments, rows, parts * target.numel() // 2)


def run(kernel, arguments, units, work, scratch=0):
    """Call kernel(*arguments, first, last) for all units, in as many threads as is worthwhile.

    Args:
        work: in state updates.
        scratch: size in floats of the scratch memory passed as the kernel's last argument; 0: none.
    """
    threads = max(1, min(torch.get_num_threads(), units, work // _STATES_PER_THREAD))
    runs = min(units, _RUNS_PER_THREAD * threads) if threads > 1 else 1
    bounds = [units * i // runs for i in range(runs + 1)]
    pending = iter([bounds[i : i + 2] for i in range(runs)])

    def do_pending():
        memory = torch.empty(scratch, dtype=torch.float32, device='cpu')
        for first, last in pending:
            kernel(*arguments, first, last, *([memory.data_ptr()] if scratch else []))

    futures = [_pool().submit(do_pending) for _ in range(threads - 1)]
    try:
        do_pending()
    finally:  # in any case, no thread may continue to use memory that the caller is about to free
        for future in futures:
            if not future.cancel():  # it has begun
                future.result()


def _pool():
    """The threads of this process: a fork inherits its parent's pools but not their threads."""
    key = os.getpid(), torch.get_num_threads()
    return _pools.get(key) or _pools.setdefault(key, ThreadPoolExecutor(key[1] - 1, 'selective_scan'))
