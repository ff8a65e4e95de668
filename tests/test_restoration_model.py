"""RestorationModel: losses, optimizer groups, clipping, average, scale, checkpoints, the degradation extractor."""

import copy
import re
from fnmatch import fnmatchcase

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.models import build_model
from basicsr.utils import get_root_logger
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
from torch.nn.utils import parameters_to_vector

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable)
from dpmambair_basicsr.archs import DegradationAutoencoder, DPMambaIR
from dpmambair_basicsr.files.errors import CheckpointError, OptionError
from dpmambair_basicsr.training.optimizers import describe_optimizers

EXTRACTOR = {'embed_dim': 8, 'extractor_channels': [4, 4]}
NETWORK = {
    'dim': 16,
    'num_blocks': [1, 1, 1, 1],
    'num_refinement_blocks': 1,
    'd_inner': [16, 16, 16, 16],
    'd_state': 2,
    **EXTRACTOR,
}
VMAMBAIR = {'type': 'VmambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
SGD = {'type': 'SGD', 'lr': 1.0}  # moves the parameters by the gradient


@LOSS_REGISTRY.register()
class PairOfLosses(torch.nn.Module):
    """Returns what BasicSR's PerceptualLoss returns: (perceptual, style)."""

    def __init__(self, content: float = 1.0, style: float = 1.0):
        super().__init__()
        self.weights = content, style

    def forward(self, pred, target):
        distance = (pred - target).abs().mean()
        return tuple(weight * distance if weight else None for weight in self.weights)


def options(network=None, path=None, **train):
    """Parsed options of a model on the CPU; by default of a DPMambaIR without extractor."""
    schedule = {'type': 'CosineAnnealingRestartLR', 'periods': [10], 'restart_weights': [1], 'eta_min': 1e-6}
    defaults = {'optim_g': {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.1}, 'scheduler': schedule, 'total_iter': 10}
    return {
        'name': 'model',
        'model_type': 'RestorationModel',
        'num_gpu': 0,
        'dist': False,
        'rank': 0,
        'is_train': True,
        'datasets': {'train': {}},
        'network_g': network or {'type': 'DPMambaIR', **NETWORK, 'insertion': 'none'},
        'path': path or {},
        'train': copy.deepcopy({**defaults, 'pixel_opt': {'type': 'L1Loss'}, **train}),
    }


def build(*args, **kwargs):
    torch.manual_seed(0)
    model = build_model(options(*args, **kwargs))
    model.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 16, 16), 'label': torch.tensor([2, 5])})
    return model


def vector(net):
    return parameters_to_vector(net.parameters()).detach().clone()


# Log


def test_the_range_of_hebs_alphas_is_logged():
    model = build()
    model.optimize_parameters(1)
    alphas = [value.item() for name, value in model.net_g.named_parameters() if name.endswith('high_frequency.alpha')]
    log = model.get_current_log()
    assert len(alphas) > 1 and min(alphas) < max(alphas), 'one step has moved them'
    assert (log['heb_alpha_min'], log['heb_alpha_max']) == (min(alphas), max(alphas))
    without = build({'type': 'DPMambaIR', **NETWORK, 'insertion': 'none', 'high_frequency': False})
    without.optimize_parameters(1)
    assert set(log) - set(without.get_current_log()) == {'heb_alpha_min', 'heb_alpha_max'}


# Losses


def test_the_sum_of_all_losses_is_minimised_and_each_is_logged():
    losses = {
        'mse_opt': {'type': 'MSELoss', 'loss_weight': 0.5},
        'fft_opt': {'type': 'FFTLoss', 'loss_weight': 0.001},
        'perceptual_opt': {'type': 'PairOfLosses', 'style': 0.25},
    }
    model = build(optim_g=SGD, **losses)
    before, output = vector(model.net_g), model.net_g(model.lq)
    distance = output - model.gt
    spectrum = torch.view_as_real(torch.fft.fft2(distance)).abs().mean()
    total = 2.25 * distance.abs().mean() + 0.5 * distance.square().mean() + 0.001 * spectrum
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.net_g.parameters()))])
    model.optimize_parameters(1)
    torch.testing.assert_close(before - vector(model.net_g), gradient, rtol=1e-3, atol=1e-5)
    l1 = distance.abs().mean().item()
    log = {'l_pix': l1, 'l_mse': 0.5 * distance.square().mean().item(), 'l_fft': 0.001 * spectrum.item()}
    assert model.log_dict == pytest.approx(log | {'l_percep': l1, 'l_style': 0.25 * l1}, rel=1e-4)


def test_basicsrs_charbonnier_loss_trains():
    model = build(pixel_opt={'type': 'CharbonnierLoss', 'loss_weight': 2.0, 'eps': 1e-6})
    expected = 2 * ((model.net_g(model.lq) - model.gt).square() + 1e-6).sqrt().mean().item()
    model.optimize_parameters(1)
    assert model.log_dict == pytest.approx({'l_pix': expected}, rel=1e-5)


def test_a_loss_of_None_is_not_logged():
    model = build(pixel_opt=None, perceptual_opt={'type': 'PairOfLosses', 'style': 0})
    model.optimize_parameters(1)
    assert list(model.log_dict) == ['l_percep']


@pytest.mark.parametrize(
    ('losses', 'message'),
    [
        ({'pix_opt': {'type': 'MSELoss'}}, r'^train\.pix_opt: logged as l_pix, as train\.pixel_opt is'),
        ({'style_opt': {'type': 'MSELoss'}, 'perceptual_opt': {'type': 'PairOfLosses'}}, r'^train\.perc.* l_style, as'),
        (
            {'a_opt': {'type': 'PairOfLosses'}, 'b_opt': {'type': 'PairOfLosses'}},
            r'^train\.b_opt: logged as l_style, as train\.a_opt is',
        ),
    ],
)
def test_two_losses_of_one_log_name_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        build(**losses).optimize_parameters(1)


def test_no_loss_is_refused():
    with pytest.raises(ValueError, match='^train: has no loss'):
        build(pixel_opt=None)


# Optimizer, average, schedule


def test_marked_parameters_are_not_decayed():
    model = build()
    names = {id(parameter): name for name, parameter in model.net_g.named_parameters()}
    decayed, others = model.optimizer_g.param_groups
    assert decayed['weight_decay'] == 0.1 and others['weight_decay'] == 0
    kinds = {names[id(parameter)].rsplit('.', 1)[1] for parameter in others['params']}
    assert kinds == {'A_logs', 'Ds'}
    assert not kinds & {names[id(parameter)].rsplit('.', 1)[1] for parameter in decayed['params']}
    assert len(decayed['params']) + len(others['params']) == len(names)


@pytest.mark.parametrize('limit', [None, 1e-3])
def test_the_gradient_is_clipped(limit):
    model = build(optim_g=SGD, grad_clip_norm=limit)
    before = vector(model.net_g)
    model.optimize_parameters(1)
    step = (vector(model.net_g) - before).norm().item()
    assert step > 0.1 if limit is None else step == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize('limit', [0, 0.0, -1])
def test_a_gradient_clipped_to_nothing_is_refused(limit):
    with pytest.raises(ValueError, match=r'^train\.grad_clip_norm: must be above 0'):
        build(grad_clip_norm=limit)


def test_the_frozen_extractor_does_not_drift_in_the_average(stage_1):
    model = build({'type': 'DPMambaIR', **NETWORK}, {'pretrain_network_e': stage_1[0]}, ema_decay=0.9999)
    before = vector(model.net_g_ema.output)
    for iteration in range(1, 4):
        model.optimize_parameters(iteration)
    for _ in range(300):
        model.model_ema(0.9999)
    assert not torch.equal(vector(model.net_g_ema.output), before)
    for name, value in model.net_g.extractor.state_dict().items():
        assert torch.equal(model.net_g_ema.extractor.state_dict()[name], value), name


@ARCH_REGISTRY.register()
class Normalised(torch.nn.Sequential):
    """Has batch normalization, and two buffers of the last image's size, one of which is not saved."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3))
        self.register_buffer('mask', torch.zeros(1), persistent=False)
        self.register_buffer('saved_mask', torch.zeros(1))

    def forward(self, image):
        self.mask = self.saved_mask = torch.ones_like(image)
        return super().forward(image)


@pytest.mark.parametrize('make', [options, lambda *arguments, **train: gan_options(options(*arguments, **train))])
def test_the_average_has_the_buffers_of_the_network(make):
    torch.manual_seed(0)
    model = build_model(make({'type': 'Normalised'}, ema_decay=0.5))
    with torch.no_grad():
        model.net_g[1].running_mean += 1
        model.model_ema(0)
    assert torch.equal(model.net_g_ema[1].running_mean, torch.ones(3))
    model.feed_data({'lq': torch.rand(1, 3, 8, 8)})
    model.test()
    for iteration in range(1, 4):
        model.feed_data({'lq': torch.rand(2, 3, 16, 16) + 3, 'gt': torch.rand(2, 3, 16, 16)})
        model.optimize_parameters(iteration)
    own, average = model.net_g[1], model.net_g_ema[1]
    for name, value in own.named_buffers():
        copied = average.get_buffer(name)
        assert torch.equal(copied, value) and copied.data_ptr() != value.data_ptr(), name
    assert average.num_batches_tracked == 3
    assert not torch.equal(model.net_g_ema[0].weight, model.net_g[0].weight), 'parameters are averaged'


@pytest.mark.parametrize(('periods', 'works'), [([8], False), ([3, 6], True), ([10], True)])
def test_a_schedule_may_end_with_the_last_iteration(periods, works):
    """BasicSR's fails if a rate is requested after its periods; iteration i requests position i - 1."""
    schedule = {'type': 'CosineAnnealingRestartLR', 'periods': periods, 'restart_weights': [1] * len(periods)}
    if not works:
        with pytest.raises(ValueError, match=r'periods sum to 8, train\.total_iter is 10'):
            build(scheduler=schedule)
        return
    model = build(scheduler=schedule)
    model.optimizer_g.step()  # PyTorch warns about schedulers that step before
    for iteration in range(1, 11):
        model.update_learning_rate(iteration)


# Frozen parameters


@pytest.mark.parametrize('model_type', ['RestorationModel', 'RestorationGANModel'])
def test_frozen_parameters_are_not_trained_and_have_no_optimizer_state(model_type, caplog, monkeypatch):
    monkeypatch.setattr(get_root_logger(), 'propagate', True)
    patterns = ['encoder_level1*', '*.norm*.weight', 'output.*']
    opt = options(VMAMBAIR, freeze=patterns, ema_decay=0.5, grad_clip_norm=1.0)
    if model_type == 'RestorationGANModel':
        opt = gan_options(opt)
    torch.manual_seed(0)
    with caplog.at_level('INFO', 'basicsr'):
        model = build_model(opt)
    before = {name: value.clone() for name, value in model.net_g.named_parameters()}
    frozen = {name for name in before if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for iteration in range(1, 3):
        model.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 16, 16)})
        model.optimize_parameters(iteration)
    average = dict(model.net_g_ema.named_parameters())
    for name, value in model.net_g.named_parameters():
        assert torch.equal(value, before[name]) == (name in frozen), name
        assert torch.equal(average[name], before[name]) == (name in frozen), name
    assert len(model.optimizer_g.state_dict()['state']) == len(before) - len(frozen)
    count = sum(before[name].numel() for name in frozen)
    assert f'{len(frozen)} of {len(before)} parameters are frozen ({count:,d} of' in caplog.text


@pytest.mark.parametrize(
    ('patterns', 'message'),
    [
        (
            ['output.*', 'encodr.*'],
            r"^train\.freeze: 'encodr\.\*' matches no parameter of VmambaIR; choose from .*output\.\*",
        ),
        (['*'], r'^train\.freeze: leaves no parameter of VmambaIR to train$'),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        build(VMAMBAIR, freeze=patterns)


def state_of(model):
    model.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 16, 16)})
    model.optimize_parameters(1)
    parts = {name: [part.state_dict() for part in getattr(model, name)] for name in ('optimizers', 'schedulers')}
    return {'iter': 3, 'epoch': 0, **parts, 'trained': describe_optimizers(model)}


def trained_by(kind, **rest):
    return {'optim_g': {'type': kind, 'lr': 1e-3, **rest}}


NORM_1, NORM_2 = ('encoder_level1.0.norm1.body', 'encoder_level1.0.norm2.body')
# Options of the state, options that continue it; what is reported with and without the record of the optimizers, the
# latter as BasicSR and earlier versions save it. None: it is not noticed, or allowed.
OTHERS = {
    'other parameters': (
        {'freeze': [f'{NORM_1}.weight']},
        {'freeze': [f'{NORM_1}.bias']},
        rf'no longer trained: net_g\.{NORM_1}\.bias; not trained before: net_g\.{NORM_1}\.weight\.',
        None,
    ),
    'fewer': (
        {},
        {'freeze': ['output.*']},
        r'no longer trained: net_g\.output\.weight\.',
        r'its optimizer has (\d+) parameters, now (?!\1)\d+ are trained\.',
    ),
    'of other shapes': (
        {'freeze': ['reduce_chan_level2.*']},
        {'freeze': ['reduce_chan_level3.*']},
        r'no longer trained: net_g\.reduce_chan_level3.weight; not trained before: net_g\.reduce_chan_level2',
        r'a parameter of its optimizer is \(.*\), now \(.*\)\.',
    ),
    'SGD': (
        trained_by('Adam'),
        trained_by('SGD', momentum=0.9),
        r'its optimizer is Adam, now SGD\.',
        r'its optimizer has no dampening, momentum, nesterov, and is thus not SGD\.',
    ),
    'RMSprop': (
        trained_by('Adam'),
        trained_by('RMSprop'),
        r'its optimizer is Adam, now RMSprop\.',
        r'its optimizer has no alpha, centered, momentum, and is thus not RMSprop\.',
    ),
    'AdamW': (trained_by('Adam'), trained_by('AdamW'), r'its optimizer is Adam, now AdamW\.', None),
    'the same': (trained_by('Adam'), trained_by('Adam', weight_decay=0.5), None, None),
}


@pytest.mark.parametrize('recorded', [True, False])
@pytest.mark.parametrize('kind', OTHERS)
def test_a_state_of_other_optimizers_is_refused(kind, recorded, tmp_path):
    before, now, *reports = OTHERS[kind]
    state = state_of(build_model(options(VMAMBAIR, **before)))
    model = build_model(options(VMAMBAIR, {'models': str(tmp_path)}, **now))
    if not recorded:
        del state['trained']
    report = reports[0 if recorded else 1]
    if report is None:
        model.resume_training(state)
        return
    weights = vector(model.net_g)
    with pytest.raises(CheckpointError, match=f'^the training state of iteration 3: {report}') as error:
        model.resume_training(state)
    assert re.search(
        r'To resume, .* train\.freeze and the types of train\.optim_\* must be unchanged', str(error.value)
    )
    assert torch.equal(vector(model.net_g), weights) and not model.optimizer_g.state


def test_a_state_of_another_model_is_refused():
    state, model = state_of(build_model(gan_options(options(VMAMBAIR)))), build_model(options(VMAMBAIR))
    message = '^the training state of iteration 3: the number of its optimizers is 2, and 1 for RestorationModel'
    with pytest.raises(CheckpointError, match=message):
        model.resume_training(state)
    # SRModel has one group, and decays what DPMambaIR marks.
    network = {'type': 'DPMambaIR', **NETWORK, 'insertion': 'none'}
    state = state_of(build_model(options(dict(network)) | {'model_type': 'SRModel'}))
    model = build_model(options(dict(network)))
    with pytest.raises(CheckpointError, match='the parameters of its optimizer are in other groups'):
        model.resume_training(state)
    del state['trained']
    with pytest.raises(CheckpointError, match=r'its optimizer has (\d+) parameters, now \d+ \+ \d+ are trained'):
        model.resume_training(state)


# Inference


@pytest.mark.parametrize('size', [(16, 16), (13, 9)])
def test_the_output_is_cropped_at_the_networks_own_scale(size):
    """Without the top-level `scale`, which is for the datasets."""
    model = build({**VMAMBAIR, 'scale': 4})
    model.lq = torch.rand(1, 3, *size)
    model.test()
    assert model.output.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert model.net_g.training


def test_the_label_reaches_the_network():
    model = build({'type': 'DPMambaIR', **NETWORK, 'degradation': 'class'}, optim_g=SGD)
    with torch.no_grad():
        for name, parameter in model.net_g.named_parameters():
            if '.modulation.' in name or name == 'output.weight':
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # at the start, labels change nothing
    before = model.net_g.classes.directions.detach().clone()
    model.optimize_parameters(1)
    moved = (model.net_g.classes.directions - before).abs().amax(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == [2, 5]

    model.test()
    expected = model.output
    model.label = model.label.flip(0)
    model.test()
    assert not torch.equal(model.output, expected)
    model.feed_data({'lq': model.lq, 'gt': model.gt})
    with pytest.raises(ValueError, match="degradation: 'class' needs a label"):
        model.test()


# Validation without ground truth


class Images:
    """A logger like TensorBoard's, of images only."""

    def __init__(self):
        self.shown = {}

    def add_image(self, name, image, _):
        self.shown[name] = image


def validate_without_gt(model, folder):
    """The images of one such validation, after an iteration of training."""
    (folder / 'real').mkdir()
    cv2.imwrite(str(folder / 'real/0.png'), np.full((16, 20, 3), 128, np.uint8))
    opt = {'name': 'real', 'type': 'SingleImageDataset', 'dataroot_lq': str(folder / 'real')}
    dataset = build_dataset(opt | {'io_backend': {'type': 'disk'}, 'phase': 'val'})
    model.optimize_parameters(1)
    model.opt['val'], images = {}, Images()
    model.nondist_validation(build_dataloader(dataset, dataset.opt), 1, images, False)
    return images.shown


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('make', [options, lambda *arguments: gan_options(options(*arguments))], ids=['plain', 'GAN'])
def test_without_ground_truth_none_of_an_earlier_batch_is_shown(make, batch, tmp_path):
    model = build_model(make(VMAMBAIR))
    data = {'lq': torch.rand(batch, 3, 16, 16), 'gt': torch.rand(batch, 3, 16, 16)}
    model.feed_data(data)
    images = validate_without_gt(model, tmp_path)
    assert images['real/0'].shape == (3, 16, 2 * 20), 'input and output'
    torch.testing.assert_close(images['real/0'][..., :20], torch.full((3, 16, 20), 128 / 255))
    model.feed_data(data)
    assert torch.equal(model.gt, data['gt'])


def test_stage_1_names_a_set_without_ground_truth(tmp_path):
    opt = options({'type': 'DegradationAutoencoder', **EXTRACTOR, 'channels': 4, 'num_fusion_blocks': 1})
    model = build_model(opt | {'model_type': 'DegradationExtractorModel'})
    model.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 16, 16)})
    with pytest.raises(OptionError, match='^dataset real has no GT, from which DegradationExtractorModel predicts'):
        validate_without_gt(model, tmp_path)


# Sources of the degradation extractor


def save(path, checkpoint):
    torch.save(checkpoint, path)
    return str(path)


@pytest.fixture(scope='module')
def stage_1(tmp_path_factory):
    """A checkpoint of stage 1, and the extractor that it contains."""
    torch.manual_seed(7)
    net = DegradationAutoencoder(**EXTRACTOR, channels=4, num_fusion_blocks=1, num_refine_blocks=1)
    file = tmp_path_factory.mktemp('stage1') / 'stage1.pth'
    return save(file, {'params': net.state_dict()}), net.extractor.merge().state_dict()


@pytest.fixture(scope='module')
def stage_2(tmp_path_factory):
    """Checkpoints of DPMambaIR with extractor ('whole'), and without ('part')."""
    torch.manual_seed(8)
    folder, whole = tmp_path_factory.mktemp('stage2'), DPMambaIR(**NETWORK).state_dict()
    part = {name: value for name, value in whole.items() if not name.startswith('extractor.')}
    files = {name: {'params': state} for name, state in (('whole', whole), ('part', part))}
    return {name: save(folder / f'{name}.pth', content) for name, content in files.items()}


def model_with(*, network=NETWORK, ema_decay=0.9, **path):
    return build({'type': 'DPMambaIR', **network}, path, ema_decay=ema_decay)


def assert_extractor(model, expected):
    for net in (model.net_g, model.net_g_ema):
        assert not any(parameter.requires_grad for parameter in net.extractor.parameters())
        for name, value in expected.items():
            assert torch.equal(net.extractor.state_dict()[name], value), name


def extractor_of(file):
    state = torch.load(file, weights_only=True)['params']
    return {name.removeprefix('extractor.'): value for name, value in state.items() if name.startswith('extractor.')}


def test_extractor_is_loaded_from_stage_1(stage_1, stage_2, tmp_path):
    file, expected = stage_1
    assert_extractor(model_with(pretrain_network_e=file), expected)
    part = {'pretrain_network_g': stage_2['part'], 'strict_load_g': False}
    model = model_with(pretrain_network_e=file, **part)
    assert_extractor(model, expected)
    output = torch.load(stage_2['part'], weights_only=True)['params']['output.weight']
    assert torch.equal(model.net_g.output.weight, output) and torch.equal(model.net_g_ema.output.weight, output)
    bare = save(tmp_path / 'bare.pth', torch.load(file, weights_only=True)['params'])
    assert_extractor(model_with(pretrain_network_e=bare), expected)


def test_extractor_is_loaded_from_a_checkpoint_of_the_whole_network(stage_1, stage_2):
    expected = extractor_of(stage_2['whole'])
    assert_extractor(model_with(pretrain_network_g=stage_2['whole']), expected)
    with pytest.raises(ValueError, match=r'^path\.pretrain_network_e: \S*whole\.pth includes its own extractor'):
        model_with(pretrain_network_g=stage_2['whole'], pretrain_network_e=stage_1[0])
    # BasicSR sets pretrain_network_g when it resumes; the option file still names stage 1, which may be gone.
    resumed = {'resume_state': '9.state', 'pretrain_network_g': stage_2['whole'], 'pretrain_network_e': 'gone.pth'}
    assert_extractor(model_with(**resumed), expected)


def gan_model(path):
    return build_model(gan_options(options({'type': 'DPMambaIR', **NETWORK}, path, ema_decay=0.9)))


def gan_options(opt):
    opt |= {'model_type': 'RestorationGANModel', 'network_d': {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3}}
    opt['network_d']['num_feat'] = 4
    opt['train'] |= {'optim_d': {'type': 'AdamW', 'lr': 1e-3}, 'gan_opt': {'type': 'GANLoss', 'gan_type': 'vanilla'}}
    return opt


@pytest.mark.parametrize('make', [lambda path: model_with(**path), gan_model], ids=['RestorationModel', 'GAN'])
def test_a_random_extractor_is_refused(make, stage_1, stage_2, tmp_path):
    with pytest.raises(ValueError, match=r'^path\.pretrain_network_e: missing\. '):
        make({})
    part = {'pretrain_network_g': stage_2['part'], 'strict_load_g': False}
    with pytest.raises(ValueError, match=r'^path\.pretrain_network_e: missing, and \S*part\.pth has no matching one'):
        make(part)
    wider = DPMambaIR(**NETWORK | {'embed_dim': 16}).state_dict()  # strict_load_g: false skips mismatched parameters
    file = save(tmp_path / 'wider.pth', {'params': wider})
    with pytest.raises(ValueError, match=r'missing, and \S*wider\.pth has no matching one'):
        make({'pretrain_network_g': file, 'strict_load_g': False})


def test_gan_model_loads_the_extractor(stage_1, stage_2):
    model = gan_model({'pretrain_network_e': stage_1[0]})
    model.feed_data({'lq': torch.rand(2, 3, 16, 16), 'gt': torch.rand(2, 3, 16, 16)})
    model.optimize_parameters(1)
    assert_extractor(model, stage_1[1])


@pytest.mark.parametrize(
    ('model_type', 'network'),
    [
        ('RestorationModel', {'type': 'DPMambaIR', **NETWORK, 'insertion': 'none'}),
        ('RestorationModel', {'type': 'DPMambaIR', **NETWORK, 'degradation': 'class'}),
        ('RestorationModel', VMAMBAIR),
        ('DegradationExtractorModel', {'type': 'DegradationAutoencoder', **EXTRACTOR}),
    ],
)
def test_a_network_without_an_extractor_is_given_none(model_type, network, stage_1):
    opt = options(dict(network), {'pretrain_network_e': stage_1[0]}) | {'model_type': model_type}
    message = rf'^path\.pretrain_network_e: this {network["type"]} does not use an extractor; write ~'
    with pytest.raises(ValueError, match=message):
        build_model(opt)
    build_model(options(dict(network)) | {'model_type': model_type})


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('text', 'not a checkpoint that torch.load can read'),
        ([1], 'expected a dictionary, got list'),
        ({'weights': {}}, 'it is not a state dict; keys of the file: weights'),
        ({'params': {'output.weight': torch.zeros(1)}}, 'not a checkpoint of stage 1 for this network: .*Missing key'),
    ],
)
def test_a_wrong_file_of_stage_1_is_named(content, message, tmp_path):
    file = tmp_path / 'wrong.pth'
    file.write_text('hello') if content == 'text' else save(file, content)
    with pytest.raises(ValueError, match=f'(?s)^{re.escape(str(file))}: {message}'):
        model_with(pretrain_network_e=str(file))


def test_an_extractor_of_other_widths_is_named(tmp_path):
    net = DegradationAutoencoder(embed_dim=16, extractor_channels=[4, 4], channels=4)
    file = save(tmp_path / 'wide.pth', {'params': net.state_dict()})
    with pytest.raises(
        ValueError, match=r'(?s)wide\.pth: not a checkpoint of stage 1 for this network: .*size mismatch'
    ):
        model_with(pretrain_network_e=file)


# Checkpoints of the whole network


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('text', 'not a checkpoint that torch.load can read'),
        ({'a': {}, 'b': {}}, "has no key 'params_ema'; keys of the file: a, b$"),
        ({'params_ema': 3}, "its key 'params_ema' is not a state dict; keys of the file: params_ema"),
        (
            {'x.weight': torch.zeros(1)},
            r"has no key 'params_ema'; it is a bare state dict, so set path\.param_key_g to ~; .*: x\.weight$",
        ),
        (
            {'params_ema': {'x': torch.zeros(1)}},
            'does not fit DPMambaIR:\n .* missing in the file: .*\n .* not in .*: x$',
        ),
    ],
)
def test_a_wrong_checkpoint_is_named(content, message, tmp_path):
    file = tmp_path / 'wrong.pth'
    file.write_text('hello') if content == 'text' else save(file, content)
    with pytest.raises(ValueError, match=f'^{re.escape(str(file))}: {message}'):
        build(path={'pretrain_network_g': str(file), 'param_key_g': 'params_ema'})
    with pytest.raises(FileNotFoundError, match='absent.pth'):
        build(path={'pretrain_network_g': str(tmp_path / 'absent.pth')})


@pytest.mark.parametrize('key', [None, 'weights'])
def test_files_of_other_programs_start_network_and_average(key, tmp_path):
    """A bare state dict, or one under another key, with DataParallel's names."""
    state = DPMambaIR(**NETWORK | {'insertion': 'none'}).state_dict()
    renamed = {f'module.{name}': value for name, value in state.items()}
    file = save(tmp_path / 'other.pth', renamed if key is None else {key: renamed})
    model = build(path={'pretrain_network_g': file, 'param_key_g': key}, ema_decay=0.9)
    for net in (model.net_g, model.net_g_ema):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


# Classes


@pytest.mark.parametrize(('model', 'most'), [('RestorationModel', 5), ('RealWorldSRGANModel', 9)])
def test_few_classes_stand_between_a_model_and_basicsr(model, most):
    """A model's additions to BasicSR are in objects that it owns, not in base classes."""
    assert len(MODEL_REGISTRY.get(model).__mro__) <= most
