"""Handles losses and gradients that are not finite."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from torch.optim import Optimizer

from dpmambair_basicsr.files.option_row import Option

MAX_SKIPPED_STEPS = 10


class StepGuard:
    """Skips steps of the watched optimizers whose loss or gradient is not finite.

    BasicSR takes such a step, then trains a network of NaNs to the end and saves it. Here the gradients are removed, so
    the optimizer does nothing; the step is counted in the log as `skipped_steps`, and training survives a bad batch.
    With DistributedDataParallel all processes skip the step, even if only one of them has the bad loss.

    Args:
        opt: of the training. `train.max_skipped_steps`: an optimizer skips at most this many steps in a row; the next
            one raises FloatingPointError. Default 10. With fp16 this includes the first few steps of a training, in
            which the loss scale is found.
    """

    option_keys = (Option('train', 'max_skipped_steps', int, 'in a row; the next ends the training', low=0),)

    def __init__(self, opt: dict):
        self.limit = (opt.get('train') or {}).get('max_skipped_steps', MAX_SKIPPED_STEPS)
        self.distributed = opt['dist']
        self.skipped = 0  # steps, since this process began
        self.skipped_in_a_row: dict[Optimizer, int] = {}
        self.names: dict[nn.Parameter, str] = {}
        self.losses_are_finite: list[Tensor] = []  # since the last step of an optimizer
        self.earlier: list[Tensor] = []  # of the iteration's earlier micro-batches
        self.is_decided = False

    def watch_loss(self, loss: nn.Module) -> None:
        loss.register_forward_hook(self.note_loss)

    def watch(self, optimizer: Optimizer, nets: dict[str, nn.Module]) -> None:
        """`nets` provide the parameter names for messages."""
        self.names |= {
            parameter: f'{name}.{part}' for name, net in nets.items() for part, parameter in net.named_parameters()
        }
        self.skipped_in_a_row[optimizer] = 0
        optimizer.register_step_pre_hook(self.check)

    def begin_micro_batch(self, is_first: bool) -> None:
        """The loss of a micro-batch affects the steps of all optimizers, which follow the last one."""
        if is_first:
            self.earlier.clear()
        else:
            self.earlier += self.losses_are_finite
            self.losses_are_finite.clear()

    def note_loss(self, loss: nn.Module, inputs, value) -> None:
        parts = value if isinstance(value, tuple) else (value,)  # BasicSR's PerceptualLoss returns two
        self.losses_are_finite += [part.detach().isfinite().all() for part in parts if isinstance(part, Tensor)]

    def check(self, optimizer: Optimizer, *_) -> None:
        """Called before a step, see `skip_if_bad`."""
        if not self.is_decided:
            self.skip_if_bad(optimizer)

    @contextmanager
    def decided(self) -> Iterator[None]:
        """In it, steps are taken as they come: `skip_if_bad` was called before."""
        self.is_decided = True
        try:
            yield
        finally:
            self.is_decided = False

    def skip_if_bad(self, optimizer: Optimizer, bad: Tensor | None = None) -> bool:
        """Removes the gradients if a step is bad; without them it leaves the optimizer's moments unchanged.

        Args:
            bad: `badness` of the step, if it is known.

        Returns:
            Whether it is bad.

        Raises:
            FloatingPointError: more than the limit in a row are not finite.
        """
        parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        if not parameters:
            return False
        if not (self.badness(parameters) if bad is None else bad):
            self.skipped_in_a_row[optimizer] = 0
            return False
        where = self.name_of_first(parameters)
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        self.skipped_in_a_row[optimizer] += 1
        in_a_row = self.skipped_in_a_row[optimizer]
        if in_a_row > self.limit:
            raise FloatingPointError(
                f'{where} is not finite; steps in a row: {in_a_row}, train.max_skipped_steps: {self.limit}. '
                'The last checkpoint is intact'
            )
        get_root_logger().warning(f'{where} is not finite: step skipped ({in_a_row} in a row, {self.skipped} in all).')
        return True

    def badness(self, parameters: list[nn.Parameter]) -> Tensor:
        """Not 0 if a gradient, or a loss since the last step, is not finite in one of the processes."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        largest = nn.utils.get_total_norm(gradients, norm_type=math.inf)
        bad = torch.stack([*self.earlier, *self.losses_are_finite, largest.isfinite()]).logical_not().any().int()
        self.losses_are_finite.clear()
        if self.distributed:  # gradients are the same everywhere, losses are not
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        return bad

    def name_of_first(self, parameters: list[nn.Parameter]) -> str:
        """Names what is not finite: the gradient of the first such parameter, or else the loss."""
        bad = next((p for p in parameters if p.grad is not None and not p.grad.isfinite().all()), None)
        if bad is None:
            return 'The loss'
        return f'The gradient of {self.names[bad]}' if bad in self.names else 'The gradient'

    def add_to_log(self, log: dict) -> dict:
        """The log of an iteration, with `skipped_steps` if there are any."""
        return {**log, 'skipped_steps': self.skipped} if self.skipped else log
