"""CosineAnnealingRestartCyclicLR: Restormer's rates, at the restarts, and after the last period. Warm-up."""

import math

import pytest
import torch
from basicsr.models import build_model
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR
from support import forked
from support.forked import changed
from test_exact_resume import GAN, check

import dpmambair_basicsr
from dpmambair_basicsr.training.lr_schedulers import CosineAnnealingRestartCyclicLR

dpmambair_basicsr.register()


def optimizer(*rates):
    groups = [{'params': [torch.nn.Parameter(torch.zeros(1))], 'lr': rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates(scheduler, steps):
    """The first group's rate in iterations 1, 2, ... of BasicSR's loop, which steps before each but the first."""
    found = []
    for iteration in range(1, steps + 1):
        if iteration > 1:
            scheduler.optimizer.step()
            scheduler.step()
        found.append(scheduler.optimizer.param_groups[0]['lr'])
    return found


def test_rates_match_the_released_deraining_schedule():
    """Constant 3e-4 for 92k iterations, then a cosine to 1e-6 over 208k (thousandths of it here)."""
    scheduler = CosineAnnealingRestartCyclicLR(optimizer(3e-4), [92, 208], [1, 1], [3e-4, 1e-6])
    found = rates(scheduler, 301)
    assert found[:93] == pytest.approx([3e-4] * 93)
    cosine = [1e-6 + (3e-4 - 1e-6) * (1 + math.cos(math.pi * t / 208)) / 2 for t in range(1, 209)]
    assert found[93:] == pytest.approx(cosine)


def test_rates_match_the_released_fine_tuning_schedule():
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


def test_every_group_has_its_rate_and_periods_their_weights():
    scheduler = CosineAnnealingRestartCyclicLR(optimizer(1.0, 0.1), [4, 4], [1, 0.5], [0, 0.01])
    rates(scheduler, 7)  # the middle of the second period
    assert scheduler.get_last_lr() == pytest.approx([0.01 + 0.25 * 0.99, 0.01 + 0.25 * 0.09])


def test_schedule_resumes_from_its_state():
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


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match='scheduler: periods, restart_weights and eta_mins .* got 2, 1 and 2'):
        CosineAnnealingRestartCyclicLR(optimizer(1.0), [5, 7], eta_mins=[0, 0])


# Warm-up

SCHEDULERS = {
    'after it': {'type': 'MultiStepLR', 'milestones': [7, 9], 'gamma': 0.5},
    'inside it': {'type': 'MultiStepRestartLR', 'milestones': [2, 9], 'gamma': 0.5, 'restarts': [0, 8]}
    | {'restart_weights': [1, 0.5]},
    'cosine': {'type': 'CosineAnnealingRestartLR', 'periods': [6, 6], 'restart_weights': [1, 0.5], 'eta_min': 1e-6},
    'cyclic': {'type': 'CosineAnnealingRestartCyclicLR', 'periods': [6, 6], 'restart_weights': [1, 1]}
    | {'eta_mins': [2e-2, 1e-6]},
}


def rates_of_training(model_type, scheduler, warmup_iter):
    """The rates of each optimizer in iterations 1 to 12."""
    changes = {'train.scheduler': scheduler, 'train.total_iter': 12}
    if model_type == 'RestorationGANModel':
        changes |= GAN
    if model_type == 'SRModel':
        changes['model_type'] = 'SRModel'
    opt = changed(forked.options({}), changes)
    model = build_model(opt | {'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1})
    found = []
    for iteration in range(1, 13):
        model.update_learning_rate(iteration, warmup_iter)
        found.append([optimizer.param_groups[0]['lr'] for optimizer in model.optimizers])
        for optimizer in model.optimizers:
            optimizer.step()
    return found


@pytest.mark.parametrize('scheduler', SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize('model_type', ['RestorationModel', 'RestorationGANModel', 'SRModel'])
def test_warm_up_rises_to_the_rates_of_any_scheduler(model_type, scheduler):
    """BasicSR's MultiStepRestartLR continues from the last rate of the warm-up, three quarters of the full one here."""
    if model_type == 'SRModel' and 'Cyclic' in scheduler['type']:
        pytest.skip('a scheduler of ours, which SRModel does not know')
    plain = rates_of_training(model_type, dict(scheduler), -1)
    warmed = rates_of_training(model_type, dict(scheduler), 4)
    for iteration in (1, 2, 3):
        assert warmed[iteration - 1] == pytest.approx([rate * iteration / 4 for rate in plain[0]])
    assert warmed[3:] == plain[3:]


@pytest.mark.parametrize('kind', ['inside it', 'cyclic'])
def test_a_training_is_resumed_inside_its_warm_up(kind, tmp_path):
    opt = changed(forked.options(forked.write_images(tmp_path / 'images')), {'train.scheduler': SCHEDULERS[kind]})
    changes = {'train.total_iter': 8, 'train.warmup_iter': 5, 'logger.save_checkpoint_freq': 1}
    check(changed(opt, changes), tmp_path, iterations=(2, 4))
