"""`train.cuda_graph`: replaying a recording gives the same training; without a GPU, on the tape of `support.tape`.

Recorded optimizer steps use fused Adam here, the only optimizer that torch can record on a CPU.
"""

import math

import pytest
import torch
from basicsr.models import build_model
from support import forked
from support.forked import changed
from support.pipelines import logged
from support.tape import Tape
from test_exact_resume import GAN
from test_numbers import everything

from dpmambair_basicsr.models.graphed_step import WARM_UP, GraphedStep, apply_capturable, why_not
from dpmambair_basicsr.ops.cuda_graphs import RecordingError, Replayed

ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason='needs an NVIDIA GPU')
PLAIN = {
    'network_g.dropout': 0.0,
    'train.optim_g': {'type': 'Adam', 'lr': 1e-2, 'fused': True},
    'train.grad_clip_norm': 0.05,
    'train.mse_opt': {'type': 'MSELoss', 'loss_weight': 0.5},
}


def build(**changes):
    opt = changed(forked.options({}), PLAIN | changes)
    torch.manual_seed(0)
    return build_model(opt | {'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1})


class Eager:
    """A recorder that records nothing: everything runs eagerly."""

    aside = Tape.aside

    def record(self, function):
        return function


def build_with(recorder, **changes):
    model, recorders = build(**changes), []
    model.graphed_step = GraphedStep(model, lambda: recorders.append(recorder()) or recorders[-1])
    return model, recorders


def batches(count, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{key: torch.rand(2, 3, size, size, generator=generator) for key in ('lq', 'gt')} for _ in range(count)]


def train(model, data, first=1):
    logs = []
    for iteration, batch in enumerate(data, first):
        model.update_learning_rate(iteration, warmup_iter=4)
        model.feed_data(batch)
        model.optimize_parameters(iteration)
        logs.append(dict(model.get_current_log()))
    return logs


def assert_equal(model, other):
    torch.testing.assert_close(everything(model), everything(other), rtol=0, atol=0)
    torch.testing.assert_close(model.net_g_ema.state_dict(), other.net_g_ema.state_dict(), rtol=0, atol=0)


def test_replays_are_bit_exact_while_rates_batches_and_averages_change():
    data = batches(10)
    (taped, recorders), (eager, _) = build_with(Tape), build_with(Eager)
    assert train(taped, data) == train(eager, data)
    assert_equal(taped, eager)
    assert [[recording.replays for recording in tape.recordings] for tape in recorders] == [[10 - WARM_UP] * 2]
    plain = build()
    train(plain, data)
    torch.testing.assert_close(taped.net_g.state_dict(), plain.net_g.state_dict(), rtol=1e-4, atol=1e-6)
    assert [group['lr'] for group in taped.optimizer_g.param_groups] == [0.0025], 'a number, as in every state'


def test_every_shape_has_its_own_recording():
    data = [*batches(5, 16), *batches(6, 24), *batches(2, 16)]
    (taped, recorders), (eager, _) = build_with(Tape), build_with(Eager)
    assert train(taped, data) == train(eager, data)
    assert_equal(taped, eager)
    assert [[recording.replays for recording in tape.recordings] for tape in recorders] == [[2] * 2, [3] * 2, []]


@pytest.mark.parametrize('place', [1, WARM_UP + 1, WARM_UP + 3], ids=['warm-up', 'recording', 'replay'])
def test_a_bad_batch_is_skipped_during_warm_up_recording_and_replay(place):
    data = batches(WARM_UP + 4)
    data[place - 1]['lq'][0, 0, 0, 0] = math.nan
    (taped, _), (eager, _) = build_with(Tape), build_with(Eager)
    with logged() as records:
        logs, others = train(taped, data), train(eager, data)
    assert len([line for line in records if 'step skipped (1 in a row, 1 in all)' in line]) == 2
    assert logs[-1] == others[-1] and logs[-1]['skipped_steps'] == 1
    assert_equal(taped, eager)


def test_resume_is_bit_exact(tmp_path):
    data = batches(12)
    (whole, _), (first, _), (second, recorders) = (build_with(Tape) for _ in range(3))
    train(whole, data)
    train(first, data[:6])
    second.net_g.load_state_dict(first.net_g.state_dict())
    second.net_g_ema.load_state_dict(first.net_g_ema.state_dict())
    torch.save([first.optimizer_g.state_dict(), first.schedulers[0].state_dict()], tmp_path / 'state')
    optimizer, scheduler = torch.load(tmp_path / 'state', weights_only=True)
    second.optimizer_g.load_state_dict(optimizer)
    second.schedulers[0].load_state_dict(scheduler)
    apply_capturable(second.optimizer_g)
    train(second, data[6:], first=7)
    assert_equal(second, whole)
    assert recorders[0].recordings[0].replays == 12 - 6 - WARM_UP


def test_a_step_that_cannot_be_recorded_is_logged_once_and_training_continues():
    class Waits(torch.nn.L1Loss):
        def forward(self, output, target):
            return super().forward(output, target) * (1 if output.sum().item() < math.inf else 0)

    data = batches(8)
    (taped, _), (eager, _) = build_with(Tape), build_with(Eager)
    for model in (taped, eager):
        model.losses['pixel_opt'] = Waits()
        model.step_guard.watch_loss(model.losses['pixel_opt'])
    with logged() as records:
        assert train(taped, data) == train(eager, data)
    assert len([line for line in records if line.startswith('train.cuda_graph: the step cannot be recorded')]) == 1
    assert_equal(taped, eager)


def test_on_a_cpu_training_runs_without_graphs_and_the_log_says_so():
    data = batches(5)
    changes = {'train.optim_g': {'type': 'AdamW', 'lr': 1e-2}, 'num_gpu': 0}
    with logged() as records:
        model = build(**changes, **{'train.cuda_graph': True})
    assert [line for line in records if 'cuda_graph' in line] == [
        'train.cuda_graph: needs a GPU; every step runs without a graph.'
    ]
    other = build(**changes)
    assert train(model, data) == train(other, data)
    assert_equal(model, other)
    assert model.optimizer_g.state_dict()['param_groups'] == other.optimizer_g.state_dict()['param_groups']


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({}, None),
        ({'train.amp': 'bf16'}, None),
        ({'train.accum_iter': 2}, 'train.accum_iter divides the step'),
        ({'train.optim_g': {'type': 'SGD', 'lr': 1e-2}}, 'train.optim_g: SGD has no argument capturable'),
        (GAN | {'train.mse_opt': None}, 'RestorationGANModel has no single step of one network'),
    ],
    ids=['plain', 'bf16', 'accumulation', 'SGD', 'GAN'],
)
def test_models_without_a_recordable_step_say_why(changes, reason):
    model = build(**changes)
    model.device = torch.device('cuda')
    found = why_not(model)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(('option', 'value'), [('num_gpu', 2), ('dist', True)])
def test_several_gpus_have_no_recordable_step(option, value):
    model = build()
    model.device = torch.device('cuda')
    model.opt[option] = value
    assert 'several GPUs' in why_not(model)


@pytest.mark.parametrize('capturable', [True, False])
def test_states_with_and_without_graphs_are_interchangeable(capturable):
    """The flag in a state is that of the run that saved it; on a CPU, plain Adam refuses it."""
    model = build(**{'train.optim_g': {'type': 'Adam', 'lr': 1e-2}})
    train(model, batches(1))
    state = model.optimizer_g.state_dict()
    for group in state['param_groups']:
        group['capturable'] = capturable
    model.optimizer_g.load_state_dict(state)
    apply_capturable(model.optimizer_g)
    train(model, batches(1), first=2)
    assert [group['capturable'] for group in model.optimizer_g.param_groups] == [False]


# --- functions of tensors


def test_a_replay_reads_copies_and_returns_the_same_tensors():
    calls = []

    def function(x, others):
        calls.append(x)
        return {'sum': x + others['y'], 'product': x * others['y']}

    replayed = Replayed(function, Tape(), warm_up=2, pure=True)
    results = []
    for seed in range(5):
        x, y = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        found = replayed(x, {'y': y})
        assert torch.equal(found['sum'], x + y) and torch.equal(found['product'], x * y)
        results.append(found)
    assert len(calls) == 4, 'two to warm up, one to compare with, one to record'
    assert results[3] is results[4] and results[2] is results[3]


def test_a_nondeterministic_function_is_detected():
    count = iter(range(9))
    replayed = Replayed(lambda x: x + next(count), Tape(), warm_up=1, pure=True)
    x = torch.zeros(2)
    replayed(x)
    with pytest.raises(RecordingError, match='its first replay gives another result'):
        replayed(x)


# --- on a GPU only


@needs_gpu
@pytest.mark.parametrize('optimizer', [{'type': 'Adam'}, {'type': 'AdamW', 'fused': True}])
def test_on_a_gpu_training_with_graphs_is_bit_exact_with_training_without(optimizer):
    data = [*batches(8, 16), *batches(8, 24)]
    changes = {'num_gpu': 1, 'train.optim_g': optimizer | {'lr': 1e-2}}
    graphs, eager = build(**changes, **{'train.cuda_graph': True}), build_with(Eager, **changes)[0]
    assert graphs.graphed_step is not None
    with logged() as records:
        assert train(graphs, data) == train(eager, data)
    assert not [line for line in records if 'cuda_graph' in line]
    assert_equal(graphs, eager)
