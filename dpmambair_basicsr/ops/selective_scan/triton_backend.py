"""Selective scan on NVIDIA GPUs by Triton's kernels: fp32, bf16 and fp16, mixed as they come, any size and strides.

Triton comes with PyTorch's CUDA builds. Both passes are PyTorch operators, so that torch.compile and torch.export take
them as they are. Results are bitwise reproducible. Extra memory, in fp32: n / 128 of u for the states that the backward
pass starts from; while it runs, the gradients and 2 n / 16 of u for sums of dB and dC.

triton_kernels.py says how it works. With TRITON_INTERPRET=1 Triton runs the kernels on the CPU, for tests. Nothing here
has been run on a GPU: tile sizes rest on the machine code that Triton makes for compute capability 9.0.
"""

import functools
import logging
import os

import torch
from torch import Tensor

# A tile. Each thread of a warp scans 4 positions of a channel, the fewer shuffles the more; the channels share what is
# read of B and C, and their sums of dB and dC. With 8 elements per thread `gradients` fits into 128 registers without
# spilling, so that a GPU holds 4 warps per scheduler; 16 take 15 percent fewer instructions, but 255 registers.
_POSITIONS = 128
_CHANNELS = 16
_ELEMENTS_PER_WARP = 8 * 32
_COMPILER_OPTIONS = {'maxnreg': 128, 'enable_fp_fusion': True}
# `chain` has tiles of its own, of as many (channel, state) pairs by as many chunks.
_CHAIN_ROWS, _CHAIN_CHUNKS = 16, 64


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s contract, with B, C (b, g, n, l) and every tensor fp32, bf16 or fp16."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    keep = differentiable or torch.jit.is_tracing()  # a trace, which may be taken without gradients, fixes this value
    return _forward(*inputs, delta_softplus, keep)[0]


def why_not(device, dtype):
    """What keeps it from running there."""
    if dtype != torch.float32:
        return f'it computes in float32, not {str(dtype).removeprefix("torch.")}'
    if device.type == 'cpu' and os.environ.get('TRITON_INTERPRET') == '1':
        return None
    if device.type != 'cuda' or torch.version.hip or not torch.cuda.is_available():
        return 'it needs an NVIDIA GPU'
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f'Triton needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less'
    return _triton_trouble()


@functools.cache
def _triton_trouble():
    try:
        from triton.runtime import driver

        _kernels()
        driver.active.utils  # noqa: B018  (Triton compiles its C code that talks to the driver, once per installation)
    except Exception as error:  # any: a missing package, compiler or Python.h, or a driver that is too old
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())  # on one line
        advice = 'it takes `pip install triton` and, once, a C compiler with Python headers (gcc, python3-dev)'
        reason = f'Triton does not work ({reason}); {advice}'
        logging.getLogger('basicsr').warning('selective_scan: much faster on this GPU with Triton, but %s', reason)
        return reason
    return None


@functools.cache
def _kernels():
    from dpmambair_basicsr.ops.selective_scan import triton_kernels

    return triton_kernels


class _Plan:
    """How the work is divided. Depends on shapes only, so that both passes find the same tiles.

    Args:
        u: (b, d, l).
        B: (b, g, n, l).
        rank: r, if step sizes are a product.
    """

    def __init__(self, u, B, rank=0):
        self.b, self.d, self.length = u.shape
        self.u, self.rank = u, rank
        self.groups, self.n = B.shape[1:3]
        self.width = self.d // self.groups
        self.T = min(_POSITIONS, _power_of_2(self.length))
        self.rows = min(_CHANNELS, _power_of_2(self.width))
        self.chunks = -(-self.length // self.T)
        self.blocks = -(-self.width // self.rows)  # of a group
        self.states = self.b, self.chunks, self.n, self.d  # the shape of one state per chunk

    def run(self, kernel, *arguments, **flags):
        """Call one of the kernels that handle tiles."""
        sizes = self.length, self.width, self.blocks, self.groups, self.chunks, self.n, self.rank
        flags['TURN'] = self.u.stride(1) == 1 and self.d > 1
        warps = max(1, self.rows * self.T // _ELEMENTS_PER_WARP)
        grid = (self.b * self.groups * self.blocks * self.chunks,)
        kernel[grid](*arguments, *sizes, **flags, ROWS=self.rows, T=self.T, num_warps=warps, **_COMPILER_OPTIONS)

    def find_starts(self, starts, x, delta, weight, A, dt, delta_bias, delta_softplus, adjoint):
        """Fill `starts` with the states that the chunks start from; the adjoint ones behind them likewise."""
        if self.chunks == 1:
            starts.zero_()
            return
        kernels = _kernels()
        ends, sums = torch.empty_like(starts), starts.new_empty(self.b, self.chunks, self.d)
        arguments = x, delta, weight, A, dt, delta_bias, ends, sums
        self.run(kernels.chunk_ends, *arguments, SOFTPLUS=delta_softplus, ADJOINT=adjoint)
        options = {'ROWS': _CHAIN_ROWS, 'CHUNKS': min(_CHAIN_CHUNKS, _power_of_2(self.chunks)), **_COMPILER_OPTIONS}
        grid = self.b, -(-self.d * self.n // _CHAIN_ROWS)
        kernels.chain[grid](ends, sums, A, starts, self.d, self.n, self.chunks, ADJOINT=adjoint, **options)


def _power_of_2(x):
    """The smallest that is not below x."""
    return 1 << (x - 1).bit_length()


def _view(x):
    return x, *x.stride()


def _tile_view(x):
    """x (b, d, l) as a tile's tuple, not folded."""
    return *_view(x), None, 0


def _contiguous(*parameters):
    return (None if x is None else x.contiguous() for x in parameters)


@torch.library.custom_op('dpmambair_basicsr::selective_scan_triton', mutates_args=())
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
    A, D, delta_bias = _contiguous(A, D, delta_bias)
    plan, y = _Plan(u, B), torch.empty_like(u)
    starts = u.new_empty(plan.states, dtype=torch.float32)
    x, steps = _tile_view(u), _tile_view(delta)
    with torch.cuda.device_of(u):
        plan.find_starts(starts, x, steps, _view(B), A, None, delta_bias, delta_softplus, adjoint=False)
        inputs = x, steps, A, _view(B), _view(C), D, None, delta_bias, starts
        plan.run(_kernels().outputs, *inputs, _tile_view(y), SOFTPLUS=delta_softplus, ACCUMULATE=False)
    return y, starts if keep else starts.new_empty(0)


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    states = _Plan(u, B).states if keep else (0,)
    return torch.empty_like(u), u.new_empty(states, dtype=torch.float32)


@torch.library.custom_op('dpmambair_basicsr::selective_scan_triton_backward', mutates_args=())
def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    starts: Tensor,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the seven tensors, in their types; in fp32, and to be ignored, for those that are None."""
    types = [torch.float32 if x is None else x.dtype for x in (A, D, delta_bias)]
    A, D, delta_bias = _contiguous(A, D, delta_bias)
    plan = _Plan(u, B)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dB, dC = u.new_empty(2, plan.blocks, *B.shape, dtype=torch.float32)
    dparameters = u.new_empty(plan.n + 2, plan.b * plan.chunks, plan.d, dtype=torch.float32)
    adjoints, steps, g_y = torch.empty_like(starts), _tile_view(delta), _tile_view(dy)
    with torch.cuda.device_of(u):
        plan.find_starts(adjoints, g_y, steps, _view(C), A, None, delta_bias, delta_softplus, adjoint=True)
        inputs = _tile_view(u), steps, A, _view(B), _view(C), D, None, delta_bias, starts, g_y, adjoints
        results = _tile_view(du), _tile_view(ddelta), dB, dC, dparameters
        plan.run(_kernels().gradients, *inputs, *results, SOFTPLUS=delta_softplus, ACCUMULATE=False)
    dparameters = dparameters.sum(1)
    parameters = dparameters[:-2].T, dparameters[-2], dparameters[-1]
    dA, dD, ddelta_bias = (x.to(dtype, copy=True).contiguous() for x, dtype in zip(parameters, types, strict=True))
    return du, ddelta, dA, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD, ddelta_bias


@_backward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, starts, dy):
    contiguous = [x.new_empty(x.shape) for x in (A, B, C)]
    channels = [u.new_empty(u.shape[1], dtype=torch.float32 if x is None else x.dtype) for x in (D, delta_bias)]
    return torch.empty_like(u), torch.empty_like(delta), *contiguous, *channels


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.keep = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # the states would get one, of zeros


def _gradients(ctx, dy, _):
    if not ctx.keep:
        raise RuntimeError('selective_scan: no gradients through a call that was recorded with gradients switched off')
    *tensors, starts = ctx.saved_tensors
    gradients = _backward(*tensors, ctx.delta_softplus, starts, dy)
    needed = ctx.needs_input_grad[: len(tensors)]
    return *(x if need else None for x, need in zip(gradients, needed, strict=True)), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
