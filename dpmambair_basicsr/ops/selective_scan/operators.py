"""The backends' functions as PyTorch operators, and their gradients."""

from collections.abc import Callable
from typing import Any

import torch

_NAMESPACE = 'dpmambair_basicsr'
_EAGER = torch.library.Library(_NAMESPACE, 'FRAGMENT')


class Operator:
    """A function of tensors as an operator: opaque to torch.compile, torch.export and torch.jit.trace.

    They see `recorded`, a custom operator of PyTorch. Its layers in Python take up to 0.1 ms for a call with gradients
    and 0.2 ms for the backward pass, longer than many a GPU kernel; calls that nothing records therefore take `eager`,
    the same function as an overload without these layers, inside of an autograd.Function.

    Args:
        name: of the operator.
        function: its schema is inferred from the annotations; it must not change its arguments.
        device: type of the devices it is for; None: all.
    """

    def __init__(self, name: str, function: Callable[..., Any], device: str | None):
        self.recorded = torch.library.custom_op(f'{_NAMESPACE}::{name}', function, mutates_args=(), device_types=device)
        self._eager_name = f'{name}.eager'
        _EAGER.define(self._eager_name + torch.library.infer_schema(function, mutates_args=()))
        _EAGER.impl(self._eager_name, function, device.upper() if device else 'CompositeExplicitAutograd')
        self.eager = getattr(getattr(torch.ops, _NAMESPACE), name).eager
        self._with_gradients: type[torch.autograd.Function] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or is_traced():
            return self.recorded(*inputs)
        if not torch.is_grad_enabled():
            return self.eager(*inputs)
        if self._with_gradients is None:  # the result may be differentiated a second time: PyTorch then raises
            return self.recorded(*inputs)
        return self._with_gradients.apply(*inputs)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As of torch.library.custom_op."""
        torch.library.register_fake(f'{_NAMESPACE}::{self._eager_name}', fake, lib=_EAGER)
        return self.recorded.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As of torch.library.custom_op."""
        self.recorded.register_autograd(backward, setup_context=setup_context)
        eager = self.eager

        class WithGradients(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = eager(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx, *gradients):
                return backward(ctx, *gradients)

        self._with_gradients = WithGradients


def operator(name: str, device: str | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate a function to make it an `Operator`."""
    return lambda function: Operator(name, function, device)


def is_traced() -> bool:
    """Whether torch.jit.trace records the calls."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def keeps_states(tensors) -> bool:
    """Whether a call with these inputs (Tensors or None) must store the states that its backward pass starts from."""
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return differentiable or is_traced()  # a trace, which may be taken without gradients, fixes this value


def differentiate(forward, backward, count: int) -> None:
    """Register the operator `backward` as the gradient of the operator `forward`.

    Args:
        forward: (*tensors, *settings, keep) -> the result and the states, which are empty unless `keep`.
        backward: (*tensors, states, gradient of the result, *settings) -> the gradient of each tensor; those not needed
            are dropped.
        count: number of tensors; some may be None.
    """

    def setup_context(ctx, inputs, output):
        *ctx.settings, ctx.keep = inputs[count:]
        ctx.save_for_backward(*inputs[:count], output[1])
        ctx.set_materialize_grads(False)  # the states would get one, of zeros

    def gradients(ctx, gradient, _):
        if not ctx.keep:
            raise RuntimeError(
                'selective scan: no gradients through a call that was recorded with gradients switched off'
            )
        results = backward(*ctx.saved_tensors, gradient, *ctx.settings)
        needed = ctx.needs_input_grad[:count]
        none = [None] * (len(ctx.needs_input_grad) - count)
        return *(x if need else None for x, need in zip(results, needed, strict=True)), *none

    forward.register_autograd(gradients, setup_context=setup_context)
