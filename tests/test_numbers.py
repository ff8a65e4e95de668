"""Losses, gradients, parameters and metrics that are not finite: skipped and counted, then an error, never saved."""

import math

import pytest
import torch
from basicsr.models import build_model
from support import forked
from support.forked import Training, changed, load, start_processes, states, train
from test_exact_resume import GAN, assert_equal

import dpmambair_basicsr
from dpmambair_basicsr.training import run as training_run
from dpmambair_basicsr.training import state as training_state

dpmambair_basicsr.register()


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return forked.write_images(tmp_path_factory.mktemp('images') / 'images')


def build(**changes):
    opt = changed(forked.options({}), changes)
    torch.manual_seed(0)
    model = build_model(opt | {'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1})
    model.clean = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    return model


def step(model, value=0.0, changed='gt'):
    """One iteration, in which one number of the target or the input is changed by this."""
    data = dict(zip(('lq', 'gt'), (image.clone() for image in model.clean), strict=True))
    data[changed][0, 0, 0, 0] += value
    model.feed_data(data)
    model.optimize_parameters(1)


def everything(model):
    nets = [model.net_g, *([model.net_d] if hasattr(model, 'net_d') else [])]
    parameters = [[value.clone() for value in net.parameters()] for net in nets]
    return parameters, [torch.utils._pytree.tree_map(copy, optimizer.state_dict()) for optimizer in model.optimizers]


def copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize('changes', [{}, {'train.grad_clip_norm': 0.1}, GAN], ids=['alone', 'clipped', 'GAN'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_non_finite_step_is_skipped(changes, value):
    model = build(**changes)
    step(model)
    assert 'skipped_steps' not in model.get_current_log()
    before = everything(model)
    step(model, value)
    assert_equal(list(everything(model)), list(before))
    assert model.get_current_log()['skipped_steps'] == len(model.optimizers)
    step(model)
    after = everything(model)
    for old, new in zip(before[0], after[0], strict=True):
        assert all(new_part.isfinite().all() for new_part in new)
        assert not all(torch.equal(*pair) for pair in zip(old, new, strict=True)), 'training continues'


@pytest.mark.parametrize('limit', [0, 3])
def test_too_many_in_a_row_are_an_error(limit):
    model = build(**{'train.max_skipped_steps': limit})
    for _ in range(3):  # after one good step, the counting starts over
        for _ in range(limit):
            step(model, math.nan)
        step(model)
    for _ in range(limit):
        step(model, math.nan)
    with pytest.raises(FloatingPointError, match=f'^The loss is not finite; steps in a row: {limit + 1}'):
        step(model, math.nan)
    assert model.step_guard.skipped == 4 * limit + 1


def test_steps_that_the_scaler_of_fp16_skips_are_counted():
    """fp16 needs a GPU, the scaler does not."""
    model = build(**{'train.max_skipped_steps': 2})
    model.precision.scaler = torch.amp.GradScaler('cpu', init_scale=64.0)
    step(model)
    before = everything(model)
    step(model, math.nan, changed='lq')  # the scaler finds this one
    step(model, math.nan)  # and the hook this one: the gradient is finite
    assert_equal(list(everything(model)), list(before))
    assert model.step_guard.skipped == 2 and model.precision.scaler.get_scale() == 32
    step(model)
    assert model.step_guard.skipped_in_a_row[model.optimizer_g] == 0 and model.step_guard.skipped == 2
    assert not torch.equal(everything(model)[0][0][0], before[0][0][0])
    for _ in range(2):
        step(model, math.nan, changed='lq')
    with pytest.raises(FloatingPointError, match=r'^The gradient of net_g\.body\.0\.weight .* in a row: 3,'):
        step(model, math.nan, changed='lq')


def test_the_scale_of_the_loss_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, 'current', training_run.TrainingRun(seed=1, items_per_iteration=2))
    model, resumed = (build(**{'path.training_states': str(tmp_path), 'path.models': str(tmp_path)}) for _ in range(2))
    for each in (model, resumed):
        each.precision.scaler = torch.amp.GradScaler('cpu')
    step(model)
    step(model, math.nan, changed='lq')
    step(model)
    training_state.write_state(model, 0, 3)
    resumed.resume_training(torch.load(tmp_path / '3.state', weights_only=True))
    assert (
        resumed.precision.scaler.state_dict()
        == model.precision.scaler.state_dict()
        != torch.amp.GradScaler('cpu').state_dict()
    )
    without = build(**{'path.models': str(tmp_path)})
    without.resume_training(torch.load(tmp_path / '3.state', weights_only=True))


def test_infinity_and_nan_are_never_the_best(images):
    model = build()
    for better, values, best in (('higher', (3, math.inf, math.nan, 5, -math.inf), 5), ('lower', (3, -math.inf), 3)):
        model.opt['val']['metrics'] = {'metric': {'better': better}}
        model._initialize_best_metric_results(better)
        for iteration, value in enumerate(values):
            model._update_best_metric_result(better, 'metric', value, iteration)
        assert model.best_metric_results[better]['metric']['val'] == best


def finite(folder, name):
    content = load(folder, name)
    assert {'params', 'params_ema'} <= content.keys()
    return all(value.isfinite().all() for key in ('params', 'params_ema') for value in content[key].values())


def test_a_bad_batch_is_skipped_in_a_training(images, tmp_path):
    log = train(changed(forked.options(images), {'network_g.nan_in': [3, 4, 7]}), tmp_path)
    assert log.count('is not finite: step skipped') == 3 and '(2 in a row, 2 in all)' in log
    assert 'skipped_steps: 3.0' in log
    assert finite(tmp_path, 'models/net_g_latest.pth')


def test_a_training_of_nan_ends_with_an_error(images, tmp_path):
    changes = {'network_g.nan_in': list(range(6, 20)), 'train.max_skipped_steps': 3}
    run = Training(changed(forked.options(images), changes), tmp_path)
    assert run.status() == 1
    last = run.log().splitlines()[-1]
    assert 'The gradient of net_g.body.0.weight is not finite; steps in a row: 4, train.max_skipped_steps: 3' in last
    assert states(tmp_path) == [2, 4, 6, 8]
    for iteration in (4, 6, 8):
        assert finite(tmp_path, f'models/net_g_{iteration}.pth')


def test_a_network_of_nan_is_not_saved(images, tmp_path):
    opt = forked.options(images)
    train(changed(opt, {'train.total_iter': 4}), tmp_path)
    file = tmp_path / 'experiments/run/models/net_g_4.pth'
    content = torch.load(file, weights_only=True)
    content['params']['body.0.weight'][0] = math.nan
    torch.save(content, file)
    run = Training(opt, tmp_path, '--auto_resume')
    assert run.status() == 1
    assert 'net_g_6.pth is not saved: params, body.0.weight is not finite' in run.log().splitlines()[-1]
    assert states(tmp_path) == [2, 4]


def test_buffers_may_be_infinite(tmp_path):
    model = build(**{'path.models': str(tmp_path)})
    for net in (model.net_g, model.net_g_ema):
        net.register_buffer('mask', torch.tensor([0, -math.inf]))
    model.save_network([model.net_g, model.net_g_ema], 'net_g', 1, ['params', 'params_ema'])
    assert torch.load(tmp_path / 'net_g_1.pth', weights_only=True)['params']['mask'][1] == -math.inf
    model.net_g.mask[0] = math.nan
    with pytest.raises(FloatingPointError, match='^net_g_2.pth is not saved: params, mask is not finite'):
        model.save_network(model.net_g, 'net_g', 2)


def test_the_processes_skip_the_same_steps(images, tmp_path):
    """If one stepped and the other did not, their networks would differ from then on."""
    changes = {'train.pixel_opt.type': 'InfiniteInOneProcess', 'train.max_skipped_steps': 2}
    runs = start_processes(changed(forked.options(images), changes), tmp_path)
    assert [run.status() for run in runs] == [1, 1]
    assert 'The loss is not finite: step skipped (2 in a row, 2 in all)' in runs[0].log()
