"""Optimizers of a package other than PyTorch; option files name them support.optimizers.<class>."""

from fractions import Fraction

import torch


class NeedsClosure(torch.optim.SGD):
    """Needs a closure that computes the loss, as LBFGS does; BasicSR passes none."""

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr)

    def step(self, closure):
        return super().step(closure)


class ForeignState(torch.optim.SGD):
    """Its state can only be read by an unpickler that runs code."""

    def __init__(self, params, lr: float = 1e-3):
        super().__init__(params, lr)

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group['steps'] = Fraction(1, 3)
