"""Selective scan on the CPU by numba's kernels, fp32, any size and strides; needs `pip install dpmambair_basicsr[cpu]`.

The work is cut into units, 16 channels of one sample (forward) or a few such blocks of one group (backward), by the shapes
alone. Threads take equal runs of units and every sum has a fixed order, so results are bitwise the same for any number of
threads. The threads are our own: numba's either die in a forked process or abort when two Python threads call them.

Both directions are PyTorch operators, which is what lets torch.compile and torch.export pass. Extra memory: n / 64 of u for
the states kept for the backward pass, and the gradients.
"""

import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Units that backward aims at where there are enough blocks: what bounds the number of threads it can use.
_BACKWARD_UNITS = 16
# Positions for which the units' own sums for the gradients of B and C are held before they are added up.
_WINDOW = 8192
# State updates that are worth a second thread; one thread makes about 5 * 10^9 of them per second.
_STATES_PER_THREAD = 2**18

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


@functools.cache
def _kernels():
    """The compiled kernels; the first call on a machine compiles them, later processes load them from numba's cache."""
    from numba.core import event

    class Notice(event.Listener):
        told = False

        def on_start(self, event):
            if not self.told:
                logging.getLogger('basicsr').info('selective_scan: compiling the numba kernels, once, about 10 s')
            self.told = True

        def on_end(self, event):
            pass

    with event.install_listener('numba:compile', Notice()):
        from dpmambair_basicsr.ops.selective_scan import numba_kernels
    return numba_kernels


@functools.cache
def _import_error():
    try:
        _kernels()
    except Exception as error:  # whatever it is: numba builds on parts of itself and of LLVM that change between versions
        reason = f'{type(error).__name__}: {str(error).strip().splitlines()[-1]}'
        reason = f'numba does not work ({reason}); install it with: pip install dpmambair_basicsr[cpu]'
        logging.getLogger('basicsr').warning('selective_scan: six times faster on this CPU with numba, but %s', reason)
        return reason
    return None


def why_not(device, dtype):
    """What keeps it from running there."""
    if device.type != 'cpu' or dtype != torch.float32:
        return f'it computes float32 on cpu, not {str(dtype).removeprefix("torch.")} on {device.type}'
    return _import_error()


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s contract, with B, C (b, g, n, l) and every tensor fp32."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    keep = differentiable or torch.jit.is_tracing()  # a trace, which may be taken without gradients, fixes this value
    return _forward(*inputs, delta_softplus, keep)[0]


def _sizes(u, A, B):
    """Groups, channels per group, n, l; blocks in a group; chunks of the sequence."""
    groups, width, length = B.shape[1], u.shape[1] // B.shape[1], u.shape[2]
    kernels = _kernels()
    return (groups, width, A.shape[1], length), -(-width // kernels.LANES), -(-length // kernels.CHUNK)


def _view(x):
    """Address and strides in bytes."""
    return x.data_ptr(), *(4 * stride for stride in x.stride())


def _pack(A, D, delta_bias, groups, blocks):
    """The channels' parameters as the kernels read them, (g * blocks, n + 2, 16): A * log2(e), D, delta_bias."""
    lanes = _kernels().LANES
    d, n = A.shape
    packed = A.new_zeros(groups, blocks * lanes, n + 2)
    channels = packed[:, : d // groups]
    torch.mul(A.view(groups, -1, n), math.log2(math.e), out=channels[..., :n])
    ...
