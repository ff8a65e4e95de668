"""CosineAnnealingRestartCyclicLR: Restormer's rates, at the restarts, and after the last period."""

import math

import pytest
import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable)
from dpmambair_basicsr.training.lr_schedulers import CosineAnnealingRestartCyclicLR


def optimizer(*rates):
    groups = [{'params': [torch.nn.Parameter(torch.zeros(1))], 'lr': rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates(scheduler, steps):
    """The first group's rate in iterations 1, 2, ... of BasicSR's loop, which steps before all but the first."""
    found = []
    for iteration in range(1, steps + 1):
        if iteration > 1:
            scheduler.optimizer.step()
            scheduler.step()
        found.append(scheduler.optimizer.param_groups[0]['lr'])
    return found


def test_released_deraining_schedule():
    """Constant 3e-4 for 92k iterations, then a cosine to 1e-6 over 208k (thousandths of it here)."""
    scheduler = CosineAnnealingRestartCyclicLR(optimizer(3e-4), [92, 208], [1, 1], [3e-4, 1e-6])
    found = rates(scheduler, 301)
    assert found[:93] == pytest.approx([3e-4] * 93)
    cosine = [1e-6 + (3e-4 - 1e-6) * (1 + math.cos(math.pi * t / 208)) / 2 for t in range(1, 209)]
    assert found[93:] == pytest.approx(cosine)


def test_rises_and_restarts_as_the_released_fine_tuning():
    """1e-4 rises to its 'lowest' rate 2.85e-4, restarts at 1e-4, falls to 1e-6; its 144k iterations end before 156k."""
    scheduler = CosineAnnealingRestartCyclicLR(optimizer(1e-4), [48, 96], [1, 1], [2.85e-4, 1e-6])
    found = rates(scheduler, 156)
    assert found[0] == pytest.approx(1e-4) and found[48] == pytest.approx(2.85e-4)
    assert all(a < b for a, b in zip(found[:48], found[1:49], strict=True))
    restart = 1e-6 + (1e-4 - 1e-6) * (1 + math.cos(math.pi / 96)) / 2
    assert found[49] == pytest.approx(restart)
    assert found[144:] == pytest.approx([1e-6] * 12), 'after the last period the rate stays'


def test_one_period_is_basicsrs_cosine():
    ours = rates(CosineAnnealingRestartCyclicLR(optimizer(2e-4), [50], [1], [1e-6]), 51)
    assert ours == pytest.approx(rates(CosineAnnealingRestartLR(optimizer(2e-4), [50], [1], 1e-6), 51))


def test_every_group_and_the_weights():
    scheduler = CosineAnnealingRestartCyclicLR(optimizer(1.0, 0.1), [4, 4], [1, 0.5], [0, 0.01])
    rates(scheduler, 7)  # the middle of the second period
    assert scheduler.get_last_lr() == pytest.approx([0.01 + 0.25 * 0.99, 0.01 + 0.25 * 0.09])


def test_resumes_from_its_state():
    periods = ([5, 7], [1, 1], [0.5, 0.1])
    straight = rates(CosineAnnealingRestartCyclicLR(optimizer(1.0), *periods), 20)
    first = CosineAnnealingRestartCyclicLR(optimizer(1.0), *periods)
    rates(first, 8)
    second = CosineAnnealingRestartCyclicLR(optimizer(1.0), *periods)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    found = []
    for _ in range(12):
        second.optimizer.step()
        second.step()
        found += second.get_last_lr()
    assert found == pytest.approx(straight[8:])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match='scheduler: periods, restart_weights and eta_mins .* got 2, 1 and 2'):
        CosineAnnealingRestartCyclicLR(optimizer(1.0), [5, 7], eta_mins=[0, 0])
