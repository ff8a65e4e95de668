"""`train.accum_iter`: a step over several micro-batches equals one over the whole batch; resume is bit-exact."""

import math

import pytest
import torch
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY
from support import forked
from support.forked import changed, load, train
from test_exact_resume import GAN, check, contents
from test_numbers import everything
from torch import nn

import dpmambair_basicsr

dpmambair_basicsr.register()

PLAIN = {'network_g.dropout': 0.0}


@ARCH_REGISTRY.register()
class TinyDiscriminator(nn.Sequential):
    """Without normalization, which would depend on the micro-batches."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))


PLAIN_GAN = GAN | {'network_d': {'type': 'TinyDiscriminator'}}
KINDS = {
    'clipped': {'train.grad_clip_norm': 0.01, 'train.mse_opt': {'type': 'MSELoss', 'loss_weight': 0.5}},
    'GAN': PLAIN_GAN,
    'stage 1': {
        'model_type': 'DegradationExtractorModel',
        'network_g': {'type': 'DegradationAutoencoder', 'embed_dim': 8, 'extractor_channels': [4, 4], 'channels': 4},
    },
}


def build(**changes):
    opt = changed(forked.options({}), PLAIN | changes)
    torch.manual_seed(0)
    return build_model(opt | {'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1})


def batches(count, size=6):
    generator = torch.Generator().manual_seed(0)
    return [{key: torch.rand(size, 3, 16, 16, generator=generator) for key in ('lq', 'gt')} for _ in range(count)]


def steps(model, data):
    logs = []
    for iteration, batch in enumerate(data, 1):
        model.feed_data(batch)
        model.optimize_parameters(iteration)
        logs.append(dict(model.get_current_log()))
    return logs


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('accum_iter', [2, 3])
def test_micro_batches_equal_the_whole_batch(kind, accum_iter):
    changes, data = KINDS[kind], batches(4)
    whole = build(**changes, **{'datasets.train.batch_size_per_gpu': 6})
    parts = build(**changes, **{'train.accum_iter': accum_iter, 'datasets.train.batch_size_per_gpu': 6 // accum_iter})
    before = everything(whole)
    logs, logs_of_parts = steps(whole, data), steps(parts, data)
    torch.testing.assert_close(everything(parts), everything(whole), rtol=2e-3, atol=2e-5)
    averages = [model.net_g_ema.state_dict() for model in (parts, whole)]
    assert averages[0].pop('calls', 0) == accum_iter * averages[1].pop('calls', 0)
    torch.testing.assert_close(*averages, rtol=2e-3, atol=2e-5)
    torch.testing.assert_close(logs_of_parts, logs, rtol=1e-3, atol=1e-5)
    assert not torch.equal(everything(whole)[0][0][0], before[0][0][0]), 'the networks have learnt'
    assert torch.equal(parts.lq, whole.lq), 'the batch is whole again'
    steps_taken = [state['step'] for state in parts.optimizer_g.state_dict()['state'].values()]
    assert set(map(float, steps_taken)) == {4}, 'one step for each batch'


@pytest.mark.parametrize('changes', [{}, PLAIN_GAN], ids=['alone', 'GAN'])
@pytest.mark.parametrize('place', [0, 2], ids=['first', 'last'])
def test_one_bad_micro_batch_skips_the_whole_step(changes, place):
    """Also if only the loss is infinite and its gradient is finite."""
    model = build(**changes, **{'train.accum_iter': 3})
    good, bad = batches(2)
    steps(model, [good])
    before = everything(model)
    bad['gt'][2 * place, 0, 0, 0] = math.inf
    steps(model, [bad])
    torch.testing.assert_close(everything(model), before, rtol=0, atol=0)
    assert model.step_guard.skipped == len(model.optimizers)
    steps(model, [good])
    assert model.step_guard.skipped == len(model.optimizers)
    assert not torch.equal(everything(model)[0][0][0], before[0][0][0])


def test_the_scaler_of_fp16_steps_once():
    model = build(**{'train.accum_iter': 3})
    model.precision.scaler = torch.amp.GradScaler('cpu', init_scale=64.0)
    plain = build(**{'train.accum_iter': 3})
    data = batches(3)
    assert steps(model, data) == steps(plain, data)
    torch.testing.assert_close(everything(model), everything(plain), rtol=1e-4, atol=1e-6)


def test_an_indivisible_batch_is_refused():
    model = build(**{'train.accum_iter': 4})
    message = r'^train\.accum_iter: 4 micro-batches have 8 images, but the loader gives 6'
    with pytest.raises(ValueError, match=message):
        steps(model, batches(1))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return forked.write_images(tmp_path_factory.mktemp('images') / 'images', count=9)


ACCUMULATED = {'train.accum_iter': 2, 'train.total_iter': 8, 'logger.save_checkpoint_freq': 1}


@pytest.mark.parametrize(
    'changes',
    [
        {'datasets.train.progressive': {'gt_sizes': [8, 8], 'batch_sizes': [2, 1], 'iters': [4, 4]}},
        GAN | {'datasets.train.num_worker_per_gpu': 1},
    ],
    ids=['progressive', 'GAN'],
)
def test_a_resumed_training_ends_as_an_uninterrupted_one(changes, images, tmp_path):
    """An epoch of 9 images has two iterations of two micro-batches of two."""
    check(changed(forked.options(images), ACCUMULATED | changes), tmp_path, iterations=(2, 3))


def test_a_training_equals_one_with_the_large_batch(images, tmp_path):
    """By the commands: the same images in the same iterations, in each phase of a progressive training."""
    log, content = {}, {}
    for name, accum_iter, size in (('parts', 2, 2), ('whole', 1, 4)):
        progressive = {'gt_sizes': [8, 8], 'batch_sizes': [size, size // 2], 'iters': [4, 4]}
        changes = {'train.accum_iter': accum_iter, 'datasets.train.batch_size_per_gpu': size}
        changes['datasets.train.progressive'] = progressive
        log[name] = train(changed(forked.options(images), PLAIN | ACCUMULATED | changes), tmp_path / name)
        content[name] = contents(tmp_path / name)
    assert 'an iteration is a step with 2 micro-batches of batch_size_per_gpu 2' in log['parts']
    for name in ('models/net_g_latest.pth',):
        for key in ('params', 'params_ema'):
            parts, whole = ({k: v for k, v in content[run][name][key].items() if k != 'calls'} for run in log)
            torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    assert load(tmp_path / 'parts', 'models/net_g_latest.pth')['params']['calls'] == 16, 'eight steps'


def test_two_processes_equal_one(images, tmp_path):
    """Gradients are only exchanged at the last micro-batch."""
    opt = changed(forked.options(images), PLAIN | {'train.total_iter': 3, 'datasets.train.use_hflip': False})
    opt = changed(opt, {'datasets.train.use_rot': False, 'datasets.train.gt_size': 12})
    runs = forked.start_processes(changed(opt, {'train.accum_iter': 2}), tmp_path / 'parts')
    assert [run.status() for run in runs] == [0, 0], runs[0].log() + runs[1].log()
    runs = forked.start_processes(changed(opt, {'datasets.train.batch_size_per_gpu': 4}), tmp_path / 'whole')
    assert [run.status() for run in runs] == [0, 0], runs[0].log() + runs[1].log()
    parts, whole = (load(tmp_path / name, 'models/net_g_latest.pth')['params'] for name in ('parts', 'whole'))
    assert parts.pop('calls') == 2 * whole.pop('calls')
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
