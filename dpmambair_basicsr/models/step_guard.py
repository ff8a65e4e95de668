"""What our models do about losses and gradients that are not finite."""

import math

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from torch.optim import Optimizer

from dpmambair_basicsr.files.option_row import Option

MAX_SKIPPED_STEPS = 10


class NumberHooks:
    """Mix-in for SRModel and its descendants: a step whose loss or gradient is not finite is not taken.

    BasicSR takes it, trains a network of NaN to the end, and saves that. Here the optimiser finds no gradients and does
    nothing, the step is counted in the log as `skipped_steps`, and training goes on, which gets over a bad batch. With
    DistributedDataParallel all processes skip the step, also if one alone has the bad loss.

    Options:
        train.max_skipped_steps: this many in a row are skipped by an optimiser; the next is a FloatingPointError.
            Default 10. With fp16 the first few of a training are among them: the scale of the loss is found so.
    """

    option_keys = (Option('train', 'max_skipped_steps', int, 'in a row; the next ends the training', low=0),)

    def __init__(self, opt: dict):
        self.skipped_steps = 0  # since this process began
        self.losses_are_finite: list[Tensor] = []  # since the last step of an optimiser
        super().__init__(opt)

    def get_optimizer(self, optim_type: str, params, lr: float, **kwargs) -> Optimizer:
        """Guards the optimiser, and at the first call the losses, which have been made then."""
        if not self.optimizers:
            losses = [*getattr(self, 'losses', {}).values()]
            losses += [value for name, value in vars(self).items() if name.startswith('cri_')]
            for loss in losses:
                if isinstance(loss, nn.Module):
                    loss.register_forward_hook(self.note_loss)
        optimizer = super().get_optimizer(optim_type, params, lr, **kwargs)
        optimizer.skipped_in_a_row = 0
        optimizer.register_step_pre_hook(self.skip_if_not_finite)
        return optimizer

    def note_loss(self, loss: nn.Module, inputs, value) -> None:
        parts = value if isinstance(value, tuple) else (value,)  # BasicSR's PerceptualLoss returns two
        self.losses_are_finite += [part.detach().isfinite().all() for part in parts if isinstance(part, Tensor)]

    def scaled_step(self, optimizer: Optimizer) -> None:
        """A step of gradients that the `scaler` of fp16 has scaled, or a plain one without fp16.

        Where they are not finite, the scaler does not call the optimiser, whose hook would count: it is called here.
        """
        scale = self.scaler.get_scale()
        self.scaler.unscale_(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self.skip_if_not_finite(optimizer)

    def skip_if_not_finite(self, optimizer: Optimizer, *_) -> None:
        """Called before the step: without gradients it is none, and leaves the optimiser's averages as they are."""
        parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        if not parameters:
            return
        largest = nn.utils.get_total_norm([parameter.grad for parameter in parameters], norm_type=math.inf)
        bad = torch.stack([*self.losses_are_finite, largest.isfinite()]).logical_not().any().int()
        self.losses_are_finite.clear()
        if self.opt['dist']:  # gradients are the same everywhere, losses are not
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if not bad:
            optimizer.skipped_in_a_row = 0
            return
        where = self.name_of_first(parameters)
        for parameter in parameters:
            parameter.grad = None
        optimizer.skipped_in_a_row += 1
        self.skipped_steps += 1
        limit = self.opt['train'].get('max_skipped_steps', MAX_SKIPPED_STEPS)
        if optimizer.skipped_in_a_row > limit:
            raise FloatingPointError(
                f'{where} is not finite; steps in a row: {optimizer.skipped_in_a_row}, '
                f'train.max_skipped_steps: {limit}. The last checkpoint is intact'
            )
        get_root_logger().warning(
            f'{where} is not finite: step skipped ({optimizer.skipped_in_a_row} in a row, {self.skipped_steps} in all).'
        )

    def name_of_first(self, parameters: list[nn.Parameter]) -> str:
        """What is not finite: the gradient of the first such parameter, or else the loss."""
        bad = next((parameter for parameter in parameters if not parameter.grad.isfinite().all()), None)
        if bad is None:
            return 'The loss'
        nets = {name: net for name, net in vars(self).items() if name.startswith('net_') and isinstance(net, nn.Module)}
        for name, net in nets.items():
            for part, parameter in self.get_bare_model(net).named_parameters():
                if parameter is bad:
                    return f'The gradient of {name}.{part}'
        return 'The gradient'

    def get_current_log(self) -> dict:
        log = super().get_current_log()
        return {**log, 'skipped_steps': self.skipped_steps} if self.skipped_steps else log
