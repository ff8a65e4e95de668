"""Selective scan on NVIDIA GPUs by Triton's kernels: fp32, bf16 and fp16, mixed as they come, any size and strides.

Triton comes with PyTorch's CUDA builds. Both passes are PyTorch operators, so that torch.compile and torch.export take
them as they are. Results are bitwise reproducible. Extra memory, in fp32: n / 128 of u for the states that the backward
pass starts from; while it runs, the gradients and 2 n / 16 of u for sums of dB and dC.

kernels.py says how it works. With TRITON_INTERPRET=1 Triton runs the kernels on the CPU, for tests. Nothing here
has been run on a GPU: tile sizes rest on the machine code that Triton makes for compute capability 9.0.
"""

import functools
import logging
import os

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.operators import differentiate, keeps_states

# A tile. Each thread of a warp scans 4 positions of a channel, the fewer shuffles the more; the channels share what is
# read of B and C, and their sums of dB and dC. With 8 elements per thread `gradients` fits into 128 registers without
# spilling, so that a GPU holds 4 warps per scheduler; 16 take 15 percent fewer instructions, but 255 registers.
_POSITIONS = 128
_CHANNELS = 16
_ELEMENTS_PER_WARP = 8 * 32
COMPILER_OPTIONS = {'maxnreg': 128, 'enable_fp_fusion': True}
# `chain` has tiles of its own, of as many (channel, state) pairs by as many chunks.
_CHAIN_ROWS, _CHAIN_CHUNKS = 16, 64


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s contract, with B, C (b, g, n, l) and every tensor fp32, bf16 or fp16."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    return _forward(*inputs, delta_softplus, keeps_states(inputs))[0]


def why_unavailable(device, dtype):
    """Why it cannot run there."""
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

        load_kernels()
        driver.active.utils  # noqa: B018  (Triton compiles its C code that talks to the driver, once per installation)
    except Exception as error:  # any: a missing package, compiler or Python.h, or a driver that is too old
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())  # on one line
        advice = 'it takes `pip install triton` and, once, a C compiler with Python headers (gcc, python3-dev)'
        reason = f'Triton does not work ({reason}); {advice}'
        logging.getLogger('basicsr').warning('selective_scan: much faster on this GPU with Triton, but %s', reason)
        return reason
    return None


@functools.cache
def load_kernels():
    from dpmambair_basicsr.ops.selective_scan.triton import kernels as triton_kernels

    return triton_kernels


class Plan:
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
        self.T = min(_POSITIONS, power_of_2(self.length))
        self.rows = min(_CHANNELS, power_of_2(self.width))
        self.chunks = -(-self.length // self.T)
        self.blocks = -(-self.width // self.rows)  # of a group
        self.states = self.b, self.chunks, self.n, self.d  # the shape of one state per chunk

    def run(self, kernel, *arguments, **flags):
        """Call one of the kernels that handle tiles."""
        sizes = self.length, self.width, self.blocks, self.groups, self.chunks, self.n, self.rank
        flags['TURN'] = self.u.stride(1) == 1 and self.d > 1
        warps = max(1, self.rows * self.T // _ELEMENTS_PER_WARP)
        grid = (self.b * self.groups * self.blocks * self.chunks,)
        kernel[grid](*arguments, *sizes, **flags, ROWS=self.rows, T=self.T, num_warps=warps, **COMPILER_OPTIONS)

    def find_starts(self, starts, x, delta, weight, A, dt, delta_bias, delta_softplus, adjoint):
        """Fill `starts` with the states that the chunks start from; the adjoint ones behind them likewise."""
        if self.chunks == 1:
            starts.zero_()
            return
        kernels = load_kernels()
        ends, sums = torch.empty_like(starts), starts.new_empty(self.b, self.chunks, self.d)
        arguments = x, delta, weight, A, dt, delta_bias, ends, sums
        self.run(kernels.chunk_ends, *arguments, SOFTPLUS=delta_softplus, ADJOINT=adjoint)
        options = {'ROWS': _CHAIN_ROWS, 'CHUNKS': min(_CHAIN_CHUNKS, power_of_2(self.chunks)), **COMPILER_OPTIONS}
        grid = self.b, -(-self.d * self.n // _CHAIN_ROWS)
        kernels.chain[grid](ends, sums, A, starts, self.d, self.n, self.chunks, ADJOINT=adjoint, **options)


def power_of_2(x):
    """The smallest that is not below x."""
    return 1 << (x - 1).bit_length()


def view(x):
    return x, *x.stride()


def tile_view(x):
    """x (b, d, l) as a tile's tuple, not folded."""
    return *view(x), None, 0


def sample_view(A):
    """A (d, n), or (b, d, n) for each sample its own, as a tuple."""
    return A, A.stride(0) if A.dim() == 3 else 0


def contiguous(*parameters):
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
    A, D, delta_bias = contiguous(A, D, delta_bias)
    plan, y = Plan(u, B), torch.empty_like(u)
    starts = u.new_empty(plan.states, dtype=torch.float32)
    x, steps, A = tile_view(u), tile_view(delta), sample_view(A)
    with torch.cuda.device_of(u):
        plan.find_starts(starts, x, steps, view(B), A, None, delta_bias, delta_softplus, adjoint=False)
        inputs = x, steps, A, view(B), view(C), D, None, delta_bias, starts
        plan.run(load_kernels().outputs, *inputs, tile_view(y), SOFTPLUS=delta_softplus, ACCUMULATE=False)
    return y, starts if keep else starts.new_empty(0)


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    states = Plan(u, B).states if keep else (0,)
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
    starts: Tensor,
    dy: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the seven tensors, in their types; in fp32, and to be ignored, for those that are None."""
    types = [torch.float32 if x is None else x.dtype for x in (A, D, delta_bias)]
    A, D, delta_bias = contiguous(A, D, delta_bias)
    plan = Plan(u, B)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dB, dC = u.new_empty(2, plan.blocks, *B.shape, dtype=torch.float32)
    dparameters = u.new_empty(plan.n + 2, plan.b * plan.chunks, plan.d, dtype=torch.float32)
    adjoints, steps, g_y, A = torch.empty_like(starts), tile_view(delta), tile_view(dy), sample_view(A)
    with torch.cuda.device_of(u):
        plan.find_starts(adjoints, g_y, steps, view(C), A, None, delta_bias, delta_softplus, adjoint=True)
        inputs = tile_view(u), steps, A, view(B), view(C), D, None, delta_bias, starts, g_y, adjoints
        results = tile_view(du), tile_view(ddelta), dB, dC, dparameters
        plan.run(load_kernels().gradients, *inputs, *results, SOFTPLUS=delta_softplus, ACCUMULATE=False)
    dparameters = dparameters.sum(1)
    parameters = dparameters[:-2].T, dparameters[-2], dparameters[-1]
    dA, dD, ddelta_bias = (x.to(dtype, copy=True).contiguous() for x, dtype in zip(parameters, types, strict=True))
    return du, ddelta, dA, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD, ddelta_bias


@_backward.register_fake
def _(u, delta, A, B, C, D, delta_bias, starts, dy, delta_softplus):
    contiguous = [x.new_empty(x.shape) for x in (A, B, C)]
    channels = [u.new_empty(u.shape[1], dtype=torch.float32 if x is None else x.dtype) for x in (D, delta_bias)]
    return torch.empty_like(u), torch.empty_like(delta), *contiguous, *channels


differentiate(_forward, _backward, 7)
