"""Learning rate schedulers that BasicSR does not have; `RestorationMixin.setup_schedulers` finds them by name."""

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dpmambair_basicsr.registry import subclasses


class CosineAnnealingRestartCyclicLR(LRScheduler):
    """Restormer's schedule: cosine annealing with restarts, with a minimum rate for each period.

    In period i, t iterations after its restart (its last iteration is t = periods[i]), the rate is
    eta_mins[i] + restart_weights[i] / 2 * (lr - eta_mins[i]) * (1 + cos(pi * t / periods[i])).
    After the last period it stays at the last eta_min; Restormer's and BasicSR's schedulers raise a TypeError there.

    Args:
        optimizer: its initial learning rate is lr.
        periods: lengths in iterations.
        restart_weights, eta_mins: as many as periods.

    Raises:
        ValueError: if the three differ in length.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        periods: Sequence[int],
        restart_weights: Sequence[float] = (1,),
        eta_mins: Sequence[float] = (0,),
    ):
        if not len(periods) == len(restart_weights) == len(eta_mins):
            raise ValueError(
                f'scheduler: periods, restart_weights and eta_mins must have the same length, got {len(periods)}, '
                f'{len(restart_weights)} and {len(eta_mins)}'
            )
        self.periods = list(periods)
        self.restart_weights = list(restart_weights)
        self.eta_mins = list(eta_mins)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        ends = list(accumulate(self.periods))
        if self.last_epoch > ends[-1]:
            return [self.eta_mins[-1] for _ in self.base_lrs]
        i = bisect_left(ends, self.last_epoch)
        progress = (self.last_epoch - (ends[i] - self.periods[i])) / self.periods[i]
        factor = self.restart_weights[i] * (1 + math.cos(math.pi * progress)) / 2
        return [self.eta_mins[i] + factor * (lr - self.eta_mins[i]) for lr in self.base_lrs]


def undo_warm_up(schedulers: Sequence[LRScheduler]) -> None:
    """Resets each parameter group to the rate of its scheduler, which a warm-up may have overwritten.

    Schedulers such as MultiStepLR continue from the current rate: the warm-up's rate would persist, and the full one
    would never be reached.
    """
    for scheduler in schedulers:
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group['lr'] = rate


def too_short(opt: dict, scheduler: dict) -> str:
    """A message if a schedule of several periods ends before the training, otherwise ''."""
    total, planned = int(opt['train']['total_iter']), sum(scheduler.get('periods', ()))
    if not planned or planned >= total - 1:  # schedulers count from 0
        return ''
    return f'periods sum to {planned}, train.total_iter is {total}'


def check_periods(opt: dict) -> None:
    """Raises ValueError if BasicSR's cosine schedule, which fails beyond its end, is shorter than the training."""
    for name in ('scheduler', 'scheduler_d'):
        scheduler = opt['train'].get(name) or {}
        if scheduler.get('type') == 'CosineAnnealingRestartLR' and (message := too_short(opt, scheduler)):
            raise ValueError(f'train.{name}.{message}: CosineAnnealingRestartLR ends there; lengthen periods')


def schedulers() -> dict[str, type]:
    """BasicSR's and ours; MultiStepLR is BasicSR's other name for MultiStepRestartLR (`BaseModel.setup_schedulers`)."""
    from basicsr.models import lr_scheduler as of_basicsr

    found = subclasses(LRScheduler, of_basicsr) | subclasses(LRScheduler, sys.modules[__name__])
    return found | {'MultiStepLR': of_basicsr.MultiStepRestartLR}
