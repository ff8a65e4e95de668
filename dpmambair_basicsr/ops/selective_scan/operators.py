"""Gradients of the backends' operators: by an operator for the backward pass, from stored states."""

import torch


def keeps_states(tensors) -> bool:
    """Whether a call with these inputs (Tensors or None) must store the states that its backward pass starts from."""
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return differentiable or torch.jit.is_tracing()  # a trace, which may be taken without gradients, fixes this value


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
