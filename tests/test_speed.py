"""Mixed precision and compilation in training: close to fp32, fp32 where it matters, without effect on saved files."""

import copy

import pytest
import torch
import yaml
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
from support import pipelines
from torch import nn

from dpmambair_basicsr.archs import DPMambaIR, VmambaIR
from dpmambair_basicsr.archs.blocks import planar_scan
from dpmambair_basicsr.archs.vmambair_arch import OSSBlock, OSSModule
from dpmambair_basicsr.models.precision import in_training, missing_compiler, mixed

TINY = {'dim': 16, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 4}
DPMAMBAIR = {**TINY, 'd_inner': [16, 16, 16, 16], 'embed_dim': 8, 'extractor_channels': [4, 4]}
SCHEDULE = {'type': 'CosineAnnealingRestartLR', 'periods': [100], 'restart_weights': [1], 'eta_min': 1e-6}


@ARCH_REGISTRY.register()
class TwoBlocks(nn.Module):
    """A single stage of a U-Net."""

    stride = 1

    def __init__(self):
        super().__init__()
        self.input = nn.Conv2d(3, 4, 1)
        self.stage = nn.Sequential(*(OSSBlock(4, OSSModule(4, 2, 'none', 'add', 1, False), None) for _ in range(2)))
        self.output = nn.Conv2d(4, 3, 1)

    @property
    def stages(self):
        return [self.stage]

    def forward(self, lq):
        return lq + self.output(self.stage(self.input(lq)))


def options(network, model_type='RestorationModel', num_gpu=0, **train):
    optimizer = {'type': 'AdamW', 'lr': 2e-3}
    return {
        'name': 'model',
        'model_type': model_type,
        'num_gpu': num_gpu,
        'dist': False,
        'rank': 0,
        'is_train': True,
        'datasets': {'train': {}},
        'network_g': dict(network),
        'path': {},
        'train': copy.deepcopy(
            {'optim_g': optimizer, 'scheduler': SCHEDULE, 'total_iter': 100, 'pixel_opt': {'type': 'L1Loss'}} | train
        ),
    }


def losses(network, iterations, **train):
    """The losses of a training that learns to brighten an image, and the model."""
    torch.manual_seed(0)
    model = build_model(options(network, **train))
    values = []
    for iteration in range(1, iterations + 1):
        lq = torch.rand(2, 3, 16, 16)
        model.feed_data({'lq': lq, 'gt': (2 * lq).clamp(max=1)})
        model.optimize_parameters(iteration)
        values.append(model.log_dict['l_pix'])
    return torch.tensor(values), model


@pytest.mark.parametrize(
    'network',
    [{'type': 'DPMambaIR', **DPMAMBAIR, 'insertion': 'none'}, {'type': 'VmambaIR', **TINY}],
    ids=['DPMambaIR', 'VmambaIR'],
)
def test_bf16_trains_like_fp32(network, monkeypatch):
    expected, _ = losses(network, 30)
    scan, arguments = planar_scan.omni_scan, []

    def note_types(*args, **kwargs):
        arguments.extend(x.dtype for x in args if isinstance(x, torch.Tensor))
        return scan(*args, **kwargs)

    monkeypatch.setattr(planar_scan, 'omni_scan', note_types)
    values, model = losses(network, 30, amp='bf16')
    assert values.isfinite().all()
    assert not torch.equal(values, expected), 'nothing is rounded'
    assert set(arguments) == {torch.float32}, 'features, projections, A and D are fp32'
    assert expected[-10:].mean() < 0.8 * expected[:3].mean(), 'fp32 has to learn something'
    assert values[-10:].mean().item() == pytest.approx(expected[-10:].mean().item(), rel=0.1)
    assert model.output.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.net_g.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ('arch', 'network'),
    [
        (DPMambaIR, {**DPMAMBAIR, 'insertion': 'modulate'}),
        (DPMambaIR, {**DPMAMBAIR, 'insertion': 'concat'}),
        (DPMambaIR, {**DPMAMBAIR, 'insertion': 'attention'}),
        (DPMambaIR, {**DPMAMBAIR, 'directions': 4, 'checkpoint_levels': [0]}),
        (VmambaIR, {**TINY, 'channel_scan': 'scalar', 'scale': 2}),
        (VmambaIR, {**TINY, 'linear_projection': True}),
    ],
    ids=str,
)
def test_every_part_runs_in_bf16(arch, network):
    torch.manual_seed(0)
    net, lq = arch(**network), torch.rand(1, 3, 16, 16)
    output = mixed(torch.bfloat16, arch.forward)(net, lq)
    output.square().sum().backward()
    torch.testing.assert_close(output, net(lq), rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_validation_is_in_fp32():
    _, model = losses({'type': 'VmambaIR', **TINY}, 1, amp='bf16')
    plain = VmambaIR(**TINY).eval()
    plain.load_state_dict(model.net_g.state_dict())
    model.test()
    with torch.no_grad():
        assert torch.equal(model.output, plain(model.lq))


def test_copies_run_on_their_own_parameters():
    net = nn.Linear(2, 2)
    in_training(net, mixed(torch.bfloat16, nn.Linear.forward))
    other = copy.deepcopy(net)
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    x = torch.ones(1, 2)
    assert not other(x).any() and net(x).any()
    assert net.state_dict().keys() == nn.Linear(2, 2).state_dict().keys()


GAN = {'model_type': 'RestorationGANModel', 'optim_d': {'type': 'Adam', 'lr': 1e-3}, 'gan_opt': {'type': 'GANLoss'}}


@pytest.mark.parametrize(
    ('train', 'message'),
    [
        ({'amp': 'fp8'}, "^train.amp: must be one of bf16, fp16, ~, got 'fp8'$"),
        ({'amp': 'fp16'}, '^train.amp: fp16 needs a GPU; write bf16$'),
        ({'amp': 'fp16', 'num_gpu': 1, **GAN}, '^train.amp: RestorationGANModel does not scale its losses'),
        ({'amp': 'bf16', 'num_gpu': 2}, '^train.amp: needs a process for each of the 2 GPUs: --launcher pytorch$'),
        ({'compile': 'yes'}, "^train.compile: expected true or false, got 'yes'$"),
        ({'compile': True}, '^train.compile: needs a C[+][+] compiler, and no-such-compiler was not found'),
    ],
    ids=str,
)
def test_unsupported_settings_are_named(train, message, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    opt = options({'type': 'VmambaIR', **TINY}, **train)
    with pytest.raises(ValueError, match=message):
        MODEL_REGISTRY.get(opt['model_type']).check_training(opt)


def test_a_gan_trains_in_bf16():
    opt = options({'type': 'VmambaIR', **TINY}, **GAN, amp='bf16')
    opt['network_d'] = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}
    opt['train']['gan_opt']['gan_type'] = 'vanilla'
    model = build_model(opt)
    model.feed_data({'lq': torch.rand(1, 3, 16, 16), 'gt': torch.rand(1, 3, 16, 16)})
    model.optimize_parameters(1)
    assert model.output.dtype == torch.float32
    assert all(torch.tensor(value).isfinite() for value in model.log_dict.values())


def test_an_option_file_trains_in_bf16(tmp_path):
    """The keys pass the check of the options; the log says what runs; names in the checkpoint are plain."""
    pairs = pipelines.write_pairs(tmp_path / 'pairs', [(24, 24)] * 2)
    opt = options({'type': 'VmambaIR', **TINY}, amp='bf16')
    opt = {key: opt[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'path', 'train')}
    opt['train'] |= {'total_iter': 2}
    opt['datasets'] = {
        'train': {'name': 'x', 'type': 'PairedDegradationDataset', 'gt_size': 16, **pairs}
        | {'num_worker_per_gpu': 0, 'batch_size_per_gpu': 2}
    }
    opt['logger'] = {'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': False}
    (tmp_path / 'train.yml').write_text(yaml.safe_dump({**opt, 'scale': 1}))
    log = pipelines.train(tmp_path / 'train.yml', cwd=tmp_path)
    assert 'Training VmambaIR on cpu: bf16, but losses, parameters and scans fp32.' in log
    saved = torch.load(tmp_path / 'experiments/model/models/net_g_latest.pth', weights_only=True)['params']
    assert saved.keys() == VmambaIR(**TINY).state_dict().keys()


@pytest.mark.skipif(missing_compiler(gpu=False) is not None, reason='torch.compile needs a C++ compiler')
def test_compiled_training_equals_eager():
    expected, eager = losses({'type': 'TwoBlocks'}, 3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    values, model = losses({'type': 'TwoBlocks'}, 3, compile=True)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert model.net_g.state_dict().keys() == eager.net_g.state_dict().keys()
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1, 'one for both blocks'
    model.test()  # another size or mode does not recompile
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='fp16 needs a GPU')
def test_fp16_trains_like_fp32():
    network = {'type': 'VmambaIR', **TINY}
    expected, _ = losses(network, 40, num_gpu=1)
    values, _ = losses(network, 40, num_gpu=1, amp='fp16')
    assert values.isfinite().all()
    assert values[-10:].mean().item() == pytest.approx(expected[-10:].mean().item(), rel=0.1)
