"""Optimizers of another package than PyTorch, which option files name as support.optimizers.<class>."""

from fractions import Fraction

import torch


class NeedsClosure(torch.optim.SGD):
    """Calls back for the loss, as LBFGS does; BasicSR gives nothing to call."""

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr)

    def step(self, closure):
        return super().step(closure)


class ForeignState(torch.optim.SGD):
    """Keeps what only an unpickler that runs code can read again."""

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr)

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group['steps'] = Fraction(1, 3)
