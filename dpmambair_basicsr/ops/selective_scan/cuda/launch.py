"""Run both passes of the CUDA kernels on tensors in their layout, pixel by pixel.

`omni.py` and `selective.py` convert their arguments to this form. Shapes: b batch, l pixels, d channels of an order, k
orders, n states, r rank, 0 in the plain scan; row = d, in the plain scan k * d.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dpmambair_basicsr.ops.selective_scan.cuda.plan import (
    MAX_ORDERS,
    Arguments,
    Plan,
    backward_steps,
    forward_steps,
    make_plan,
    specialize,
    states_shape,
)
from dpmambair_basicsr.ops.selective_scan.cuda.runtime import Kernel, launching_on, load, shared_limit

_TYPES = {torch.float32: 'float', torch.bfloat16: 'bf16', torch.float16: 'fp16'}


class Inputs(NamedTuple):
    """The inputs of a scan, on one device.

    Attributes:
        x: (b, l, row), fp32, bf16 or fp16.
        delta: (b, l, row), same types, before bias and softplus; None unless the scan is plain.
        projected: (b, l, k * (r + 2n)), same types: per order low-rank step sizes, B and C.
        dt_weight: (k, d, r); None if the scan is plain.
        dt_bias: (k, d).
        A: (k * d, n), or (b, k * d, n).
        D: (k * d,).
        directions: of the orders; 0 for each group of a plain scan.
        size: height and width.
        softplus: whether to apply softplus to the step sizes.
    """

    x: Tensor
    delta: Tensor | None
    projected: Tensor
    dt_weight: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    directions: tuple[int, ...]
    size: tuple[int, int]
    softplus: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """b, l, d, k, n, r; independent of the constants of a plan, so that sizes may be symbolic."""
        k, d = self.dt_bias.shape
        rank = 0 if self.dt_weight is None else self.dt_weight.shape[2]
        return self.x.shape[0], self.x.shape[1], d, k, self.A.shape[-1], rank


class Gradients(NamedTuple):
    """The gradients of `Inputs`: of x, delta and projected in their types, of the others in fp32."""

    x: Tensor
    delta: Tensor | None
    projected: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor


class _Launches(NamedTuple):
    """The launches of one pass, for given shape, types and device."""

    plan: Plan
    common: bytes  # the arguments except the tensors
    steps: list[tuple[Kernel, int, tuple[int, int, bool, bool]]]  # kernel, grid, arguments that differ between launches


def shape_of_states(inputs: Inputs) -> tuple[int, ...]:
    """The shape of the states that `forward` keeps for `backward`."""
    b, length, d, k, n, _ = inputs.shape
    return states_shape(b, d, length, k, n)


def forward(inputs: Inputs, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the sum of the scans, (b, l, row) in x's type, and, if `keep`, the states that `backward` starts from."""
    x = inputs.x
    with launching_on(x.device) as stream:
        launches = _launches('forward', *_key(inputs))
        out, new = torch.empty_like(x), _fp32_on(x)
        states = new(*shape_of_states(inputs)) if keep else new(0)
        _launch(
            launches,
            stream,
            inputs,
            out=out,
            acc=out if x.dtype == torch.float32 else new(*x.shape),
            checkpoints=states if keep else None,
            **_starts(inputs, launches.plan, 'states', new),
        )
    return out, states


def backward(inputs: Inputs, states: Tensor, dy: Tensor) -> Gradients:
    """Return the gradients from dy, (b, l, row), contiguous, in x's type; none for a dt_weight that is None."""
    x, delta, projected = inputs[:3]
    b, _, d, k, n, rank = inputs.shape
    with launching_on(x.device) as stream:
        launches = _launches('backward', *_key(inputs))
        plan = launches.plan
        new, parts = _fp32_on(x), plan.blocks
        dx, ddelta = torch.empty_like(x), None if delta is None else torch.empty_like(delta)
        dprojected = torch.empty_like(projected) if parts == 1 else new(parts, *projected.shape)
        dparameters = new(k, b, plan.chunks, n + 2 + rank, d)
        _launch(
            launches,
            stream,
            inputs,
            checkpoints=states,
            dy=dy,
            out=dx,
            acc=dx if x.dtype == torch.float32 else new(*x.shape),
            ddelta=ddelta,
            dprojected=dprojected if parts == 1 else None,
            dparts=dprojected if parts > 1 else None,
            dparameters=dparameters,
            **_starts(inputs, plan, 'adjoints', new),
        )
        if parts > 1:
            dprojected = dprojected.sum(0).to(projected.dtype)
        dA, dD, dbias, dweight = dparameters.sum((1, 2)).split([n, 1, 1, rank], dim=1)
        dA = dA.mT.flatten(0, 1)
        if inputs.A.dim() == 3:
            dA = dparameters[:, :, :, :n].sum(2).permute(1, 0, 3, 2).reshape(inputs.A.shape)
    return Gradients(dx, ddelta, dprojected, dweight.mT, dbias.squeeze(1), dA, dD.flatten())


def _key(inputs):
    x, own_A = inputs.x, inputs.A.dim() == 3
    types = x.dtype, x.dtype if inputs.delta is None else inputs.delta.dtype, inputs.projected.dtype
    return inputs.shape, inputs.size, inputs.directions, inputs.softplus, own_A, types, x.device


@functools.lru_cache(4096)
def _launches(name, shape, size, directions, softplus, own_A, types, device):
    b, length, d, k, n, rank = shape
    plan = make_plan(b, d, length, n, rank, directions, shared_limit(device))
    constants = plan.constants | {'SOFTPLUS': int(softplus)}
    constants |= dict(zip(('TX', 'TD', 'TP'), map(_TYPES.__getitem__, types), strict=True))
    first, last = plan.pairs[0], plan.pairs[-1]
    steps = []
    for step in (forward_steps if name == 'forward' else backward_steps)(plan, b, d, k):
        pair = step.orders or first  # steps for all orders are the same in every specialization
        module = load(name, specialize(constants, max(1, len(pair))), device)
        orders = (*(pair[:1] or (0,)), *(pair[-1:] or (0,)), pair != first, pair == last)
        steps.append((module(step.kernel, step.threads, step.shared), step.grid, orders))
    common = Arguments(
        batch=b,
        length=length,
        height=size[0],
        width=size[1],
        d=d,
        row=d if rank else k * d,
        orders=k,
        chunks=plan.chunks,
        A_sample=k * d * n if own_A else 0,
    )
    for i, direction in enumerate(directions[:MAX_ORDERS]):  # a plain scan may have more groups, but ignores these
        common.direction[i] = direction
    return _Launches(plan, bytes(common), steps)


def _launch(launches, stream, inputs, **tensors):
    arguments = Arguments.from_buffer_copy(launches.common)
    for name, tensor in zip(inputs._fields[:7], inputs, strict=False):
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
    for kernel, grid, (arguments.first, arguments.second, arguments.accumulate, arguments.last) in launches.steps:
        kernel(arguments, grid, stream)


def _starts(inputs, plan, name, new):
    b, _, d, k, n, _ = inputs.shape
    if plan.chunks == 1:
        return {}
    return {name: new(b, k, plan.chunks, n, d), 'sums': new(b, k, plan.chunks, d)}


def _fp32_on(x):
    return lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
