"""VmambaIR: the released networks' outputs, names and sizes; the scan pixel by pixel; the ablations; every scale."""

import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.archs.vmambair_arch import OSSModule

GOLDEN = Path(__file__).parents[2] / 'shared' / 'golden'
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='no ../shared/golden: outputs of the released networks')

# From the option files: released blocks and refinement blocks, kinds of channel scan, parameters.
RELEASED = {
    'derain': (dict(channel_scan='lifted', channel_fusion='add'), [3, 5, 7, 9], 2, 28_709_875),
    'sisr': (dict(scale=4, channel_scan='lifted', channel_fusion='modulate'), [15, 1, 1, 1], 15, 12_028_273),
    'realsr': (dict(scale=4, channel_scan='scalar', channel_fusion='modulate'), [6, 2, 2, 1], 6, 10_497_813),
}


def released(task):
    options, blocks, refinement, _ = RELEASED[task]
    with torch.device('meta'):
        return VmambaIR(**options, num_blocks=blocks, num_refinement_blocks=refinement)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return VmambaIR(**{'dim': 8, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 4} | options).eval()


@pytest.fixture(params=RELEASED)
def golden(request):
    """(network with the fixture's weights, the fixture)."""
    fixture = torch.load(GOLDEN / f'golden_{request.param}.pt', weights_only=True)
    net = tiny(**RELEASED[request.param][0], d_state=16)
    net.load_state_dict(fixture['state_dict'], strict=True)
    return net, fixture


def assert_golden(output, expected, name=''):
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=1e-4, msg=lambda message: f'{name}: {message}')


@needs_golden
@torch.no_grad()
def test_outputs_match_the_released_networks(golden):
    net, fixture = golden
    assert [case['input'].shape[-2:] for case in fixture['cases']] == [(24, 40), (16, 16), (19, 26)]
    for case in fixture['cases']:
        assert_golden(net(case['input']), case['output'], case['name'])


@needs_golden
@torch.no_grad()
def test_each_part_matches_the_released_networks(golden):
    """In order of computation, so that the first failure names the part that differs."""
    net, fixture = golden
    block = net.encoder_level1[0]
    parts = {
        'patch_embed': net.patch_embed,
        'norm1': block.norm1,
        'planar': lambda x: block.attn.out_norm(block.attn.scan(x)),
        'channel': block.attn.scan_channels,
        'attn': block.attn,
        'norm2': block.norm2,
        'ffn': block.ffn,
        'block': block,
        'down1_2': net.down1_2,
        'latent': net.latent,
        'up2_1': net.up2_1,
        'refinement': net.refinement,
    }
    for name, part in parts.items():
        assert_golden(part(fixture['probes'][f'{name}.in']), fixture['probes'][f'{name}.out'], name)


@needs_golden
@torch.no_grad()
def test_the_module_alone_matches_the_released_one(golden):
    net, fixture = golden
    oss, attn = fixture['oss'], net.encoder_level1[0].attn
    module = OSSModule(oss['config']['d_model'], 16, attn.channel_scan, attn.channel_fusion, 4, False)
    module.load_state_dict(oss['state_dict'], strict=True)
    assert_golden(module(oss['input']), oss['output'])


@needs_golden
@pytest.mark.parametrize('task', RELEASED)
def test_parameter_names_and_shapes_match_the_released_networks(task):
    schema = json.loads((GOLDEN / f'schema_{task}.json').read_text())
    assert {name: list(value.shape) for name, value in released(task).state_dict().items()} == schema


@pytest.mark.parametrize('task', RELEASED)
def test_parameter_counts_match_the_released_networks(task):
    assert sum(parameter.numel() for parameter in released(task).parameters()) == RELEASED[task][3]


def pixels_of_mean(shape, *_, out_shape=None, **__):
    """Pooling counts one operation per pixel, as in fvcore; FlopCounterMode counts two per MAC."""
    return 2 * math.prod(shape)


@pytest.mark.parametrize(
    ('task', 'pixels', 'without_scan', 'with_scan'),
    [('realsr', 64, 15.67, 19.45), ('sisr', 64, 25.59, 34.33), ('derain', 256, 121.25, 162.53)],
)
@torch.no_grad()
def test_flops_match_the_documented_ones_by_both_rules(task, pixels, without_scan, with_scan, monkeypatch):
    """The table of docs/vmambair.md: billions, 1 MAC = 1, of an input of pixels x pixels.

    Convolutions, projections and pooling, counted in a pass on the meta device; for the planar scans 9BLDN + BDL
    (state-spaces/mamba#110) of the shapes they are called with. The channel scans are below 0.01.
    """
    scans = []

    def note_shapes(u, delta, A, B, *_, **__):
        if B.shape[1] == 4:  # directions; the channel scan has two
            scans.append((u.numel(), A.shape[1]))  # BLD, N
        return torch.empty_like(u)

    module = sys.modules['dpmambair_basicsr.ops.omni_scan']  # in the package, this name is the function
    monkeypatch.setattr(module, 'selective_scan', note_shapes)
    net = released(task)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mean: pixels_of_mean}) as counter:
        net(torch.empty(1, 3, pixels, pixels, device='meta'))
    counted = counter.get_total_flops() / 2
    assert len(scans) == sum(isinstance(module, OSSModule) for module in net.modules())
    assert counted / 1e9 == pytest.approx(without_scan, abs=5e-3)
    assert (counted + sum(9 * bld * n + bld for bld, n in scans)) / 1e9 == pytest.approx(with_scan, abs=5e-3)


def scan_by_step(sequence, x_proj, dt_proj, dt_bias, A_logs, D):
    """One selective scan, step by step. sequence: list of (D,) vectors; returns as many outputs."""
    rank, n = dt_proj.shape[1], A_logs.shape[1]
    state, outputs = torch.zeros_like(A_logs), []
    for u in sequence:
        projected = x_proj @ u
        delta = F.softplus(dt_proj @ projected[:rank] + dt_bias)[:, None]
        B, C = projected[rank : rank + n], projected[rank + n :]
        state = torch.exp(-delta * torch.exp(A_logs)) * state + delta * B * u[:, None]
        outputs.append(state @ C + D * u)
    return outputs


def layer_norm(vector, norm):
    centred = vector - vector.mean()
    return centred / torch.sqrt(centred.square().mean() + 1e-5) * norm.body.weight + norm.body.bias


def oss_by_pixel(m, image):
    """The OSS module as the paper's Sec. 4.2.1 and 4.3 describe it, a pixel at a time; image: (C, H, W)."""
    channels, height, width = image.shape

    def project(layer, vector):
        return layer.weight.flatten(1) @ vector + layer.bias

    pixels = list(itertools.product(range(height), range(width)))
    both = {(i, j): project(m.in_conv, image[:, i, j]) for i, j in pixels}
    features = {p: vector[:channels] for p, vector in both.items()}
    gates = {p: vector[channels:] for p, vector in both.items()}
    u = {
        (i, j): F.silu(
            m.conv2d.bias
            + sum(
                m.conv2d.weight[:, 0, di + 1, dj + 1] * features[i + di, j + dj]
                for di, dj in itertools.product((-1, 0, 1), repeat=2)
                if (i + di, j + dj) in features
            )
        )
        for i, j in pixels
    }
    rows = pixels
    columns = [(i, j) for j in range(width) for i in range(height)]
    y = dict.fromkeys(u, 0)
    for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])[: m.x_proj_weight.shape[0]]):
        own = slice(k * channels, (k + 1) * channels)
        outputs = scan_by_step(
            [u[p] for p in order],
            m.x_proj_weight[k], m.dt_projs_weight[k], m.dt_projs_bias[k], m.A_logs[own], m.Ds[own],
        )  # fmt: skip
        y = {p: y[p] + output for p, output in zip(order, outputs, strict=True)}
    y = {p: layer_norm(y[p], m.out_norm) * F.silu(gates[p]) for p in rows}

    if m.channel_scan != 'none':
        pooled = [value[None] for value in torch.stack(list(y.values())).mean(0)]
        if m.channel_scan == 'lifted':
            pooled = [project(m.conv_cin, value) for value in pooled]
        s = pooled[0].numel()
        merged = 0
        for k in (0, 1):
            own = slice(k * s, (k + 1) * s)
            outputs = scan_by_step(
                pooled[::-1] if k else pooled,
                m.xc_proj_weight[k], m.dtc_projs_weight[k], m.dtc_projs_bias[k], m.Ac_logs[own], m.Dsc[own],
            )  # fmt: skip
            merged = merged + torch.stack(outputs[::-1] if k else outputs)
        if m.channel_scan == 'lifted':
            merged = torch.stack([project(m.conv_cout, value) for value in merged])
        c = layer_norm(merged[:, 0], m.channel_norm)
        y = {p: y[p] + c if m.channel_fusion == 'add' else y[p] * c + y[p] for p in rows}
    output = torch.stack([project(m.out_conv, y[p]) for p in rows], dim=1)
    return output.unflatten(1, (height, width))


@pytest.mark.parametrize(
    ('channel_scan', 'channel_fusion', 'directions', 'linear'),
    [
        ('lifted', 'add', 4, False),
        ('lifted', 'modulate', 4, True),
        ('scalar', 'modulate', 4, False),
        ('scalar', 'add', 1, True),
        ('none', 'add', 1, False),
    ],
)
@torch.no_grad()
def test_module_matches_the_paper_pixel_by_pixel(channel_scan, channel_fusion, directions, linear):
    torch.manual_seed(0)
    module = OSSModule(6, 3, channel_scan, channel_fusion, directions, linear).double()
    for parameter in module.parameters():
        parameter.normal_()
    image = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    expected = torch.stack([oss_by_pixel(module, one) for one in image])
    torch.testing.assert_close(module(image), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('scale', [1, 2, 3, 4, 8])
def test_every_scale_upsamples_the_image(scale):
    net = tiny(scale=scale)
    lq = torch.rand(1, 3, 8, 16)
    assert net(lq).shape == (1, 3, 8 * scale, 16 * scale)
    for name, parameter in net.named_parameters():  # without its last layer, the network returns the image
        if name.startswith(('output', 'tail.1')):
            torch.nn.init.zeros_(parameter)
    assert torch.equal(net(lq), lq.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3))


@pytest.mark.parametrize('task', RELEASED)
def test_every_parameter_receives_a_gradient(task):
    net = tiny(**RELEASED[task][0])
    net(torch.rand(1, 3, 16, 16)).square().sum().backward()
    dead = {name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}
    # The channel norm that follows subtracts the mean, and with it this bias.
    assert all(name.endswith('conv_cout.bias') for name in dead), dead


@pytest.mark.parametrize('scale', [1, 4])
def test_bias_applies_to_the_layers_in_the_docstring(scale):
    with_bias, without = (
        {name for name, _ in tiny(scale=scale, bias=bias).named_parameters()} for bias in (True, False)
    )
    parts = {re.sub(r'^.*ffn', 'ffn', name) for name in with_bias - without}
    effn = {f'ffn.{part}.bias' for part in ('project_in', 'dwconv', 'project_out')}
    stem = {'patch_embed.proj.bias', 'reduce_chan_level3.bias', 'reduce_chan_level2.bias'}
    assert parts == effn | stem | ({'output.bias'} if scale == 1 else set())


# Table 4. V3 has more blocks in the paper; their number is not published.
def test_ablation_v1_scans_in_one_direction():
    net = tiny(planar_directions=1, channel_scan='none')
    x = torch.randn(1, 8, 4, 6)
    changed = x.clone()
    changed[:, :, 2, 3:] += 1
    changed[:, :, 3:] += 1
    scan = net.encoder_level1[0].attn.scan
    before, after = scan(x).flatten(2), scan(changed).flatten(2)
    first = 2 * 6 + 3
    assert torch.equal(before[..., :first], after[..., :first]), 'a pixel must not depend on later ones'
    assert (before - after)[..., first:].abs().amin() > 0


def test_ablation_v2_has_no_channel_scan():
    names = {name for name, _ in tiny(channel_scan='none').named_parameters()}
    full = {name for name, _ in tiny().named_parameters()}
    assert names < full
    parts = {name.split('attn.')[1].split('.')[0] for name in full - names}
    projections = {'xc_proj_weight', 'dtc_projs_weight', 'dtc_projs_bias', 'Ac_logs', 'Dsc'}
    assert parts == projections | {'conv_cin', 'conv_cout', 'channel_norm'}


def test_ablation_v3_has_no_ffn():
    names = {name for name, _ in tiny(ffn=False).named_parameters()}
    full = {name for name, _ in tiny().named_parameters()}
    assert names < full and all('.ffn.' in name or '.norm2.' in name for name in full - names)


@torch.no_grad()
def test_ablation_v4_computes_the_same_with_linear_layers():
    net, linear = tiny(), tiny(seed=1, linear_projection=True)
    own = linear.state_dict()
    linear.load_state_dict({name: value.reshape(own[name].shape) for name, value in net.state_dict().items()})
    lq = torch.rand(1, 3, 16, 8)
    torch.testing.assert_close(net(lq), linear(lq), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ('options', 'key'),
    [
        ({'scale': 5}, 'scale'),
        ({'channel_scan': 'both'}, 'channel_scan'),
        ({'channel_fusion': 'multiply'}, 'channel_fusion'),
        ({'planar_directions': 2}, 'planar_directions'),
        ({'out_channels': 1}, 'out_channels'),
        ({'num_blocks': [1, 2, 3]}, 'num_blocks'),
        ({'dim': 7}, 'dim'),
        ({'dim': 0}, 'dim'),
    ],
    ids=str,
)
def test_errors_name_the_key(options, key):
    with pytest.raises(ValueError, match=f'^{key}: '):
        tiny(**options)
