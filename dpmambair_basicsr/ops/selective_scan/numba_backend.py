"""Selective scan on the CPU by numba's kernels: fp32, any size and strides. Needs `pip install dpmambair_basicsr[cpu]`.

The shapes alone cut the work into units: a block of 16 channels of a sample in the forward pass, a few blocks of a
group in the backward pass. Units share nothing and every sum has a fixed order: results are bitwise the same for any
number of threads. The threads are our own; numba's kill a forked process, or abort when two Python threads call them.

Both passes are PyTorch operators, so that torch.compile and torch.export take them as they are. Extra memory: n / 64 of
u for the states that the backward pass starts from, the gradients, and a buffer whose size does not depend on l.
"""

import functools
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# The backward pass has at least so many units, and so can use as many threads, if there are as many blocks.
_BACKWARD_UNITS = 16
# Units of the same group sum dB and dC each for itself. After so many positions the sums are added up and their memory
# is free again.
_BACKWARD_POSITIONS = 8192
# State updates that are worth waking up another thread: about 50 microseconds' work.
_STATES_PER_THREAD = 2**18
# A thread whose core has other things to do leaves some of its runs of units to the others.
_RUNS_PER_THREAD = 4

_LOG2_E = math.log2(math.e)
_pools = {}  # (process, threads) -> ThreadPoolExecutor; never emptied, threads take few values


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s contract, with B, C (b, g, n, l) and every tensor fp32 on the CPU."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    keep = differentiable or torch.jit.is_tracing()  # a trace, which may be taken without gradients, fixes this value
    return _forward(*inputs, delta_softplus, keep)[0]


def why_not(device, dtype):
    """What keeps it from running there."""
    if device.type != 'cpu' or dtype != torch.float32:
        return f'it computes float32 on a CPU, not {str(dtype).removeprefix("torch.")} on {device.type}'
    return _numba_trouble()


@functools.cache
def _numba_trouble():
    try:
        _kernels()
    except Exception as error:  # any: numba relies on inner parts of Python and LLVM, which change between versions
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())  # on one line
        reason = f'numba does not work ({reason}); pip install dpmambair_basicsr[cpu]'
        logging.getLogger('basicsr').warning('selective_scan: six times faster on this CPU with numba, but %s', reason)
        return reason
    return None


@functools.cache
def _kernels():
    """The compiled kernels. The first process to ask compiles them, later ones load them from numba's cache."""
    from numba.core import event

    class Notice(event.Listener):
        told = False

        def on_start(self, _):
            if not self.told:
                self.told = True
                logging.getLogger('basicsr').warning('selective_scan: compiling the CPU kernels, some 10 s, once')

        def on_end(self, _):
            pass

    with event.install_listener('numba:compile', Notice()):
        from dpmambair_basicsr.ops.selective_scan import numba_kernels
    return numba_kernels


def _layout(u, B):
    """What the kernels call sizes (groups, channels per group, n, l), the blocks of a group and the chunks of l."""
    groups, n, length = B.shape[1:]
    width = u.shape[1] // groups
    return (groups, width, n, length), -(-width // _kernels().LANES), -(-length // _kernels().CHUNK)


def _results(u, B, keep):
    """Room for what `_forward` returns."""
    (groups, _, n, _), blocks, chunks = _layout(u, B)
    states = (u.shape[0], groups * blocks, chunks, n, _kernels().LANES) if keep else (0,)
    return torch.empty_like(u), u.new_empty(states)


@torch.library.custom_op('dpmambair_basicsr::selective_scan_numba', mutates_args=(), device_types='cpu')
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y, in the layout of u, and the states that `_backward` starts from, if `keep`."""
    kernels = _kernels()
    sizes, blocks, _ = _layout(u, B)
    y, states = _results(u, B, keep)
    parameters = _pack(A, D, delta_bias, *sizes[:2], blocks)
    inputs = sizes, delta_softplus, _view(u), _view(delta), parameters.data_ptr(), _view(B), _view(C)
    arguments = *inputs, _view(y), states.data_ptr() if keep else 0
    units = u.shape[0] * sizes[0] * blocks
    _run(kernels.forward, arguments, units, u.numel() * B.shape[2], kernels.forward_scratch(B.shape[2]))
    return y, states


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    return _results(u, B, keep)


@torch.library.custom_op('dpmambair_basicsr::selective_scan_numba_backward', mutates_args=(), device_types='cpu')
def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the seven tensors, D and delta_bias counting as zeros where they are None."""
    kernels = _kernels()
    sizes, blocks, chunks = _layout(u, B)
    b, (groups, _, n, length) = u.shape[0], sizes
    rows = b * groups * n
    parameters = _pack(A, D, delta_bias, *sizes[:2], blocks)
    dparameters = parameters.new_zeros(b, *parameters.shape)
    adjoints = u.new_zeros(b, groups * blocks, n, kernels.LANES)
    du, ddelta, dB, dC = torch.empty_like(u), torch.empty_like(delta), B.new_empty(B.shape), C.new_empty(C.shape)
    parts = min(blocks, -(-_BACKWARD_UNITS // (b * groups)))
    window = chunks if parts == 1 else min(chunks, _BACKWARD_POSITIONS // kernels.CHUNK)
    if parts == 1:
        sums = dB.view(1, rows, length), dC.view(1, rows, length)
    else:
        sums = B.new_empty(2, parts, rows, window * kernels.CHUNK).unbind()
    arguments = (
        *(sizes, delta_softplus, _view(u), _view(delta), parameters.data_ptr(), _view(B), _view(C), _view(dy)),
        *(states.data_ptr(), _view(du), _view(ddelta), dparameters.data_ptr(), adjoints.data_ptr()),
        *(_view(sums[0]), _view(sums[1]), parts),
    )
    for last in range(chunks, 0, -window):
        first = max(0, last - window)
        work = 2 * u.numel() * n * (last - first) // chunks  # a step back is worth two forward
        _run(kernels.backward, (*arguments, first, last), b * groups * parts, work, kernels.backward_scratch(n))
        if parts > 1:
            positions = slice(first * kernels.CHUNK, min(length, last * kernels.CHUNK))
            for source, target in zip(sums, (dB, dC), strict=True):
                _add_parts(source, target.view(rows, length)[:, positions])
    total = torch.empty_like(parameters)
    _add_parts(dparameters.flatten(2), total.flatten(1))
    dA, dD, ddelta_bias = _unpack(total, *sizes[:2])
    return du, ddelta, dA, dB, dC, dD, ddelta_bias


@_backward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, states, dy):
    d = u.shape[1]
    contiguous = (x.new_empty(x.shape) for x in (A, B, C))
    return torch.empty_like(u), torch.empty_like(delta), *contiguous, u.new_empty(d), u.new_empty(d)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.keep = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # the states would get one, of zeros


def _gradients(ctx, dy, _):
    if not ctx.keep:
        raise RuntimeError('selective_scan: no gradients through a call that was recorded with gradients switched off')
    *tensors, states = ctx.saved_tensors
    gradients = _backward(*tensors, ctx.delta_softplus, states, dy)
    needed = ctx.needs_input_grad[: len(tensors)]
    return *(x if need else None for x, need in zip(gradients, needed, strict=True)), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _view(x):
    """Address and strides in bytes."""
    return x.data_ptr(), *(4 * stride for stride in x.stride())


def _pack(A, D, delta_bias, groups, width, blocks):
    """The parameters of the channels as the kernels read them, (g * blocks, n + 2, 16): A * log2(e), D, delta_bias."""
    n, lanes = A.shape[1], _kernels().LANES
    packed = A.new_zeros(groups, blocks * lanes, n + 2)
    channels = packed[:, :width]
    channels[..., :n] = A.unflatten(0, (groups, width)) * _LOG2_E
    if D is not None:
        channels[..., n] = D.view(groups, width)
    if delta_bias is not None:
        channels[..., n + 1] = delta_bias.view(groups, width)
    return packed.view(groups * blocks, lanes, n + 2).transpose(1, 2).contiguous()


def _unpack(packed, groups, width):
    """The inverse of `_pack` for gradients: those of A, D and delta_bias, each in memory of its own."""
    channels = packed.transpose(1, 2).reshape(groups, -1, packed.shape[1])[:, :width].flatten(0, 1)
    columns = channels[:, :-2], channels[:, -2], channels[:, -1]
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in columns)


def _add_parts(source, target):
    """target (rows, columns) = the sum of source (parts, rows, >= columns), in order; columns next to one another."""
    parts, rows, _ = source.shape
    (_, part_stride, row_stride, _), (start, target_stride, _) = _view(source), _view(target)
    arguments = parts, source.data_ptr(), part_stride, row_stride, start, target_stride, target.shape[1]
    _run(_kernels().add_parts, arguments, rows, parts * target.numel() // 2)


def _run(kernel, arguments, units, work, scratch=0):
    """Call kernel(*arguments, first, last) so that it does all units, in as many threads as pays off.

    Args:
        work: in state updates.
        scratch: floats of memory that the kernel gets as its last argument; 0: it takes none.
    """
    threads = max(1, min(torch.get_num_threads(), units, work // _STATES_PER_THREAD))
    runs = min(units, _RUNS_PER_THREAD * threads) if threads > 1 else 1
    bounds = [units * i // runs for i in range(runs + 1)]
    pending = iter([bounds[i : i + 2] for i in range(runs)])

    def do_pending():
        memory = torch.empty(scratch, dtype=torch.float32, device='cpu')
        for run in pending:
            kernel(*arguments, *run, *([memory.data_ptr()] if scratch else []))

    futures = [_pool().submit(do_pending) for _ in range(threads - 1)]
    try:
        do_pending()
    finally:  # whatever happens, no thread may go on using memory that the caller is about to free
        for future in futures:
            if not future.cancel():  # it has begun
                future.result()


def _pool():
    """Threads of this process: a fork has its parent's pools but not their threads."""
    key = os.getpid(), torch.get_num_threads()
    return _pools.get(key) or _pools.setdefault(key, ThreadPoolExecutor(key[1] - 1, 'selective_scan'))
