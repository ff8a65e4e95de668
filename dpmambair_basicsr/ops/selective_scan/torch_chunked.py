"""Selective scan in plain PyTorch: any device, fp32 and fp64; the backward recomputes states from a few stored ones.

One Python step per position would cost more than its arithmetic. So the sequence is cut into chunks of T positions, and
c chunks lie side by side on the last, contiguous axis and advance together: T steps instead of c * T. A chunk scales
its initial state by a factor, exp(A * sum(delta)), which links the chunks.
One block of c * T positions:

1. sweep all chunks from a zero state, which gives what each adds to the state: end[i];
2. chain them: start[i + 1] = exp(A * sum(delta over chunk i)) * start[i] + end[i];
3. sweep again, from start[i], and compute y.

The backward pass repeats step 3 from the stored starts, then takes the same three steps from right to left with the
adjoint state. Every exponent is a sum of delta * A, never positive; the shorter form, which divides by
exp(cumsum(delta * A)), overflows.

Shapes: b batch, g groups, w channels per group, d = g * w channels, n states, l positions, m = b * c.
A state is (n, g, w, m); axes along which a tensor is constant have size 1; a block of T steps is (T, n, g, w, m).
Extra memory: n / T of u for the stored starts, plus buffers for one block, whose size does not depend on l.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.operators import keeps_states

name, reads_half, omni_scan = 'torch', False, None

# Elements of one step. On a CPU its few tensors stay in cache and still outweigh the cost of a call; measured flat from
# 2^15 to 2^17. On other devices a launch costs more, so steps are larger (not measured).
_STEP_ELEMENTS_CPU = 2**16
_STEP_ELEMENTS_ELSEWHERE = 2**20
# T. A larger one stores fewer states, a smaller one keeps the backward's 2 * T states closer to the cache; measured
# flat from 16 to 64.
_POSITIONS_MAX, _POSITIONS_MIN = 32, 8
# PyTorch's CPU loops take two vector registers (2 * 16 floats) of a row at a time and the rest one by one.
_ROW = 32

_LOG2_E = math.log2(math.e)


class _Plan(NamedTuple):
    cuts: list[slice]  # the channels of each group that are processed together
    blocks: int  # number along the sequence
    chunks: int  # number in a block, side by side: c
    positions: int  # number in a chunk: T


def _plan(u: Tensor, A: Tensor, B: Tensor) -> _Plan:
    """How to divide the work; depends on shapes and device only, so the backward pass uses the same plan."""
    (b, d, length), n, g = u.shape, A.shape[1], B.shape[1]
    budget = _STEP_ELEMENTS_CPU if u.device.type == 'cpu' else _STEP_ELEMENTS_ELSEWHERE
    w = d // g
    width = min(w, max(1, budget // (n * g * max(b, _ROW))))
    width = _ceil_div(w, _ceil_div(w, width))  # the same number of cuts, of equal size
    multiple = _ROW // math.gcd(b, _ROW)
    chunks = max(1, budget // (n * g * width * b) // multiple * multiple)
    blocks = _ceil_div(length, _POSITIONS_MAX * chunks)
    positions = max(min(_POSITIONS_MIN, length), _ceil_div(length, blocks * chunks))
    chunks = min(chunks, _ceil_div(length, positions))
    blocks = _ceil_div(length, positions * chunks)
    return _Plan([slice(first, first + width) for first in range(0, w, width)], blocks, chunks, positions)


def _ceil_div(a, b):
    return -(-a // b)


class _Views(NamedTuple):
    """The inputs, or their gradients, in a common shape; None: not given, or no gradient needed."""

    u: Tensor | None  # (b, 1, g, w, l)
    delta: Tensor | None  # (b, 1, g, w, l)
    A: Tensor | None  # (n, g, w, 1)
    B: Tensor | None  # (b, n, g, 1, l)
    C: Tensor | None  # (b, n, g, 1, l)
    D: Tensor | None  # (g, w, 1)
    delta_bias: Tensor | None  # (g, w, 1)


def _channels(x, g, cut):
    """View (b, d, l) as (b, 1, g, w, l), the channels `cut` of each group."""
    return None if x is None else x.unflatten(1, (1, g, -1))[:, :, :, cut]


def _views(g, cut, u, delta, A, B, C, D, delta_bias) -> _Views:
    return _Views(
        _channels(u, g, cut),
        _channels(delta, g, cut),
        None if A is None else A.t().unflatten(1, (g, -1))[:, :, cut, None],
        None if B is None else B.transpose(1, 2).unsqueeze(3),
        None if C is None else C.transpose(1, 2).unsqueeze(3),
        None if D is None else D.unflatten(0, (g, -1))[:, cut, None],
        None if delta_bias is None else delta_bias.unflatten(0, (g, -1))[:, cut, None],
    )


def _by_chunk(steps, b):
    """View (T, ..., b * c) as (b, ..., c, T)."""
    return steps.unflatten(-1, (b, -1)).movedim((0, -2), (-1, 0))


def _read(x, start, steps, beyond_end='repeat'):
    """Fill steps (T, ..., b * c) with x (b, ..., l) from start on; beyond l repeat the last position, or insert zeros.

    Inputs are repeated, so that the extra steps are as well-behaved as the last; their results are dropped. Zeros in dy
    keep the adjoint state at zero until the sequence begins.
    """
    view = _by_chunk(steps, x.shape[0])
    chunks, positions = view.shape[-2:]
    part = x[..., start : start + chunks * positions]
    missing = chunks * positions - part.shape[-1]
    if missing:
        last = part[..., -1:] if beyond_end == 'repeat' else part.new_zeros(())
        part = torch.cat([part, last.expand(*part.shape[:-1], missing)], dim=-1)
    view.copy_(part.unflatten(-1, (chunks, positions)))


def _add(steps, start, x):
    """Add steps (T, ..., b * c) to x (b, ..., l) from start on."""
    view = _by_chunk(steps, x.shape[0])
    chunks, positions = view.shape[-2:]
    part = x[..., start : start + chunks * positions]
    if part.shape[-1] == chunks * positions:
        part.unflatten(-1, (chunks, positions)).add_(view)
    else:
        part.add_(view.flatten(-2)[..., : part.shape[-1]])


def _new_steps(x, plan):
    """Allocate one block of x (b, ..., l): (T, ..., b * c)."""
    return x.new_empty(plan.positions, *x.shape[1:-1], x.shape[0] * plan.chunks)


def _chain(first, gains, ends, reverse=False):
    """The initial state of each chunk: first (n, g, w, b), then gain * state + end; gains and ends (n, g, w, b * c)."""
    b = first.shape[-1]
    chunks = list(zip(gains.unflatten(-1, (b, -1)).unbind(-1), ends.unflatten(-1, (b, -1)).unbind(-1), strict=True))
    states = [first]
    for gain, end in chunks[:0:-1] if reverse else chunks[:-1]:
        states.append(torch.addcmul(end, gain, states[-1]))
    return torch.stack(states[::-1] if reverse else states, dim=-1).flatten(-2)


class _Block:
    """The inputs of one block as steps, in buffers that all blocks use in turn."""

    def __init__(self, x: _Views, delta_softplus: bool, plan: _Plan):
        self.x = x
        self.raw = _new_steps(x.delta, plan)
        self.step = _new_steps(x.delta, plan) if delta_softplus else self.raw
        self.u, self.drive = _new_steps(x.u, plan), _new_steps(x.u, plan)
        self.B, self.C = _new_steps(x.B, plan), _new_steps(x.C, plan)
        self.zero = x.delta.new_zeros(())
        # PyTorch 2.15's exp takes four times as long as its exp2 on an AMD CPU, and is no more accurate.
        self.A_log2_e = x.A * _LOG2_E

    def load(self, start: int):
        for x, steps in ((self.x.delta, self.raw), (self.x.u, self.u), (self.x.B, self.B), (self.x.C, self.C)):
            _read(x, start, steps)
        if self.x.delta_bias is not None:
            self.raw += self.x.delta_bias
        if self.step is not self.raw:
            # softplus without F.softplus's threshold at 20; F.softplus takes ten times as long here.
            torch.logaddexp(self.raw, self.zero, out=self.step)
        torch.mul(self.step, self.u, out=self.drive)

    def decay(self, step, out=None):
        return torch.mul(step, self.A_log2_e, out=out).exp2_()


def _forward(x: _Views, delta_softplus: bool, plan: _Plan, y: Tensor, starts: list[Tensor] | None):
    """Add the outputs to y, shaped as x.u, and append the initial states of each block's chunks to starts."""
    b, T = x.u.shape[0], plan.positions
    block = _Block(x, delta_softplus, plan)
    out_steps = _new_steps(x.u, plan)
    step, drive, B, C, out = (s.unbind(0) for s in (block.step, block.drive, block.B, block.C, out_steps))
    h = x.u.new_zeros(*x.A.shape[:-1], b)
    decay, product = (x.u.new_empty(*x.A.shape[:-1], b * plan.chunks) for _ in range(2))
    for i in range(plan.blocks):
        start = i * T * plan.chunks
        block.load(start)
        if plan.chunks > 1:
            end = torch.zeros_like(decay)
            for t in range(T):
                end.mul_(block.decay(step[t], out=decay)).addcmul_(drive[t], B[t])
            h = _chain(h, block.decay(block.step.sum(0)), end)
        if starts is not None:
            starts.append(h.clone())
        for t in range(T):
            h.mul_(block.decay(step[t], out=decay)).addcmul_(drive[t], B[t])
            torch.sum(torch.mul(h, C[t], out=product), 0, keepdim=True, out=out[t])
        h = h.unflatten(-1, (b, -1))[..., -1].clone()
        if x.D is not None:
            out_steps.addcmul_(block.u, x.D)
        _add(out_steps, start, y)


def _backward(x: _Views, delta_softplus: bool, plan: _Plan, starts: list[Tensor], dy: Tensor, grad: _Views):
    """Add the gradients to the tensors of grad."""
    b, T = x.u.shape[0], plan.positions
    block = _Block(x, delta_softplus, plan)
    A = x.A.contiguous()
    dy_steps, du_steps, ddelta_steps = (_new_steps(x.u, plan) for _ in range(3))
    dB_steps, dC_steps = (_new_steps(x.B, plan) for _ in range(2))
    step, drive, B, C, dy_t, ddrive, ddelta, dB, dC = (
        s.unbind(0)
        for s in (block.step, block.drive, block.B, block.C, dy_steps, du_steps, ddelta_steps, dB_steps, dC_steps)
    )
    adjoint = x.u.new_zeros(*A.shape[:-1], b)
    shape = (*A.shape[:-1], b * plan.chunks)
    h = x.u.new_empty(T + 1, *shape).unbind(0)  # h[t] is the state before step t
    decay = x.u.new_empty(T, *shape).unbind(0)
    product, flow, dA = x.u.new_empty(shape), x.u.new_empty(shape), x.u.new_zeros(shape)
    for i in reversed(range(plan.blocks)):
        start = i * T * plan.chunks
        block.load(start)
        _read(dy, start, dy_steps, beyond_end='zeros')
        h[0].copy_(starts[i])
        for t in range(T):
            torch.mul(h[t], block.decay(step[t], out=decay[t]), out=h[t + 1]).addcmul_(drive[t], B[t])
            if grad.C is not None:
                torch.sum(torch.mul(h[t + 1], dy_t[t], out=product), 2, keepdim=True, out=dC[t])
        if plan.chunks > 1:
            end = torch.zeros_like(dA)
            for t in reversed(range(T)):
                end.addcmul_(dy_t[t], C[t]).mul_(decay[t])
            adjoint = _chain(adjoint, block.decay(block.step.sum(0)), end, reverse=True)
        for t in reversed(range(T)):
            adjoint.addcmul_(dy_t[t], C[t])
            if grad.B is not None:
                torch.sum(torch.mul(adjoint, drive[t], out=product), 2, keepdim=True, out=dB[t])
            torch.sum(torch.mul(adjoint, B[t], out=product), 0, keepdim=True, out=ddrive[t])
            torch.mul(adjoint.mul_(decay[t]), h[t], out=flow)  # the gradient of log(decay)
            torch.sum(torch.mul(flow, A, out=product), 0, keepdim=True, out=ddelta[t])
            if grad.A is not None:
                dA.addcmul_(flow, step[t])
        adjoint = adjoint.unflatten(-1, (b, -1))[..., 0].clone()
        ddelta_steps.addcmul_(du_steps, block.u)
        if delta_softplus:
            ddelta_steps.mul_(block.raw.sigmoid_())
        du_steps.mul_(block.step)
        if x.D is not None:
            du_steps.addcmul_(dy_steps, x.D)
        for steps, total in ((du_steps, grad.u), (ddelta_steps, grad.delta), (dB_steps, grad.B), (dC_steps, grad.C)):
            if total is not None:
                _add(steps, start, total)
        if grad.D is not None:
            grad.D.add_(dy_steps.mul_(block.u).sum((0, 1, -1)).unsqueeze(-1))
        if grad.delta_bias is not None:
            grad.delta_bias.add_(ddelta_steps.sum((0, 1, -1)).unsqueeze(-1))
    if grad.A is not None:
        grad.A.add_(dA.sum(-1, keepdim=True))


# A registered operator, not an autograd.Function: torch.jit.trace, and with it fvcore's FLOP count, then sees one node
# instead of thousands, 0.3 s instead of 6 s for d = 64 and l = 65536; and a trace stays differentiable.
@torch.library.custom_op('dpmambair_basicsr::chunked_scan', mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return y and, if `keep`, the initial states of each block's chunks for the backward pass."""
    g, plan = B.shape[1], _plan(u, A, B)
    y = torch.zeros_like(u, memory_format=torch.contiguous_format)
    starts = []
    for cut in plan.cuts:
        inputs = _views(g, cut, u, delta, A, B, C, D, delta_bias)
        _forward(inputs, delta_softplus, plan, _channels(y, g, cut), starts if keep else None)
    return y, starts


@torch.library.custom_op('dpmambair_basicsr::chunked_scan_backward', mutates_args=())
def _scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    starts: list[Tensor],
    dy: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Return the gradients of the tensors that need one. Not differentiable itself: PyTorch raises, by name."""
    g, plan = B.shape[1], _plan(u, A, B)
    tensors = (u, delta, A, B, C, D, delta_bias)
    grads = [x.new_zeros(x.shape) if need else None for x, need in zip(tensors, needed, strict=True)]
    for i, cut in enumerate(plan.cuts):
        kept = starts[i * plan.blocks : (i + 1) * plan.blocks]
        _backward(_views(g, cut, *tensors), delta_softplus, plan, kept, _channels(dy, g, cut), _views(g, cut, *grads))
    return [grad for grad in grads if grad is not None]


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, keep):
    g, plan = B.shape[1], _plan(u, A, B)
    widths = [_channels(u, g, cut).shape[3] for cut in plan.cuts for _ in range(plan.blocks)]
    starts = [u.new_empty(A.shape[1], g, width, u.shape[0] * plan.chunks) for width in widths]
    return u.new_empty(u.shape), starts if keep else []


@_scan_backward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, starts, dy, needed):
    tensors = (u, delta, A, B, C, D, delta_bias)
    return [x.new_empty(x.shape) for x, need in zip(tensors, needed, strict=True) if need]


def _save(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, *output[1])


def _differentiate(ctx, dy, _):
    tensors, starts = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
    needed = list(ctx.needs_input_grad[:7])
    grads = iter(_scan_backward(*tensors, ctx.delta_softplus, starts, dy, needed))
    return *(next(grads) if need else None for need in needed), None, None


_scan.register_autograd(_differentiate, setup_context=_save)


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """`selective_scan`'s contract, with B, C (b, g, n, l) and every tensor of one type, fp32 or fp64."""
    tensors = (u, delta, A, B, C, D, delta_bias)
    return _scan(*tensors, delta_softplus, keeps_states(tensors))[0]


def why_unavailable(device, dtype):
    """It runs everywhere."""
    return None
