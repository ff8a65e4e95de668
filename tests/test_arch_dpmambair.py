"""DPMambaIR and its extractor: the paper's counts, ablation switches, initial identity, exact merging."""

import copy
import inspect

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from dpmambair_basicsr.archs import DegradationAutoencoder, DegradationExtractor, DPMambaIR
from dpmambair_basicsr.archs.blocks import PlanarScan
from dpmambair_basicsr.archs.dpmambair_arch import DPSSModule
from dpmambair_basicsr.ops import use_backend
from dpmambair_basicsr.ops.selective_scan import reference

# The defaults of version 692b954.
EARLIER_DEFAULTS = {
    'delta_prompt': 'low_rank',
    'extractor_channels': (64, 64, 64, 64, 64, 128),
    'extractor_hidden': 512,
}
TINY = dict(
    dim=16,
    num_blocks=[1, 1, 1, 1],
    num_refinement_blocks=1,
    d_inner=[16, 32, 64, 128],
    d_state=4,
    embed_dim=24,
    extractor_channels=[8, 8, 8],
)


def millions(net) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


def build(**options):
    with torch.device('meta'):
        return DPMambaIR(**options)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    net = DPMambaIR(**{**TINY, **options}).eval()
    torch.nn.init.normal_(net.output.weight)  # the default is nearly zero, which would hide differences
    return net


@pytest.mark.parametrize(('embed_dim', 'expected'), [(256, 28.71), (384, 29.03), (512, 29.35), (1024, 30.62)])
def test_parameter_counts_match_the_paper(embed_dim, expected):
    """v3, Table VII. In the first versions (prompt times low-rank delta), three of four counts were further off."""
    assert millions(build(embed_dim=embed_dim)) == pytest.approx(expected, abs=0.015)
    assert {
        name: value
        for name, value in EARLIER_DEFAULTS.items()
        if inspect.signature(DPMambaIR).parameters[name].default != value
    } == EARLIER_DEFAULTS
    misses = abs(millions(build(embed_dim=embed_dim, **EARLIER_DEFAULTS)) - expected) > 0.015
    assert misses == (embed_dim != 512)


@pytest.mark.parametrize('insertion', ['concat', 'attention'])
def test_other_insertions_have_similar_parameter_counts(insertion):
    assert millions(build(insertion=insertion)) == pytest.approx(29.35, rel=0.1)


def test_embeddings_from_any_source_have_unit_length():
    image, label = torch.rand(3, 3, 16, 16), torch.tensor([1, 0, 6])
    for net in (tiny(), tiny(degradation='class')):
        torch.testing.assert_close(net.embed(image, label).norm(dim=1), torch.ones(3))
    assert tiny(degradation='class', unit_classes=False).embed(image, label).norm(dim=1).min() > 1.5


def test_parameter_count_with_four_directions_is_close_to_the_paper():
    """Table 5: 31.43 M."""
    assert millions(build(directions=4, prompt=['delta', 'B'])) == pytest.approx(31.43, abs=0.05)


def test_flops_match_the_paper():
    """153.33 G at 1x3x256x256, 1 MAC = 1, without the papers' hand-written norms, which fvcore does not count.

    Counted at 64x64 to save time: the cost of convolutions and projections is exactly proportional to the pixels.
    """
    flops = (
        FlopCountAnalysis(DPMambaIR().eval(), torch.rand(1, 3, 64, 64)).unsupported_ops_warnings(False).by_operator()
    )
    per_pixel = flops['conv'] + flops['matmul']
    assert set(flops) <= {'conv', 'matmul', 'linear', 'layer_norm'}
    assert (16 * per_pixel + flops['linear']) / 1e9 == pytest.approx(153.33, abs=0.02)


SWITCHES = [
    {'prompt': prompt}
    for prompt in (['delta'], ['B'], ['C'], ['delta', 'B'], ['delta', 'C'], ['B', 'C'], ['delta', 'B', 'C'])
] + [
    {'delta_prompt': 'low_rank'},
    {'degradation': 'class', 'unit_classes': False},
    {'high_frequency': False},
    {'degradation': 'class'},
    {'insertion': 'concat'},
    {'insertion': 'attention'},
    {'directions': 2, 'prompt': ['delta', 'B']},
    {'directions': 4, 'prompt': ['delta', 'B']},
]


@pytest.mark.parametrize('options', SWITCHES, ids=str)
def test_embedding_has_no_effect_at_initialisation(options):
    """At step 0 the embedding has no effect: the network is bit-exact with the one without prompts and HEB."""
    net = tiny(**options)
    plain = tiny(seed=1, insertion='none', high_frequency=False, directions=options.get('directions', 1))
    own = net.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    lq, label = torch.rand(2, 3, 24, 16), torch.tensor([1, 6])
    assert torch.equal(net(lq, label), plain(lq))


@pytest.mark.parametrize('options', [{'insertion': 'none'}, *SWITCHES], ids=str)
def test_every_trainable_parameter_receives_a_gradient(options):
    net = tiny(**options).train()
    torch.manual_seed(2)
    for parameter in net.parameters():  # away from the identity, where some gradients are zero by construction
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    net(torch.rand(2, 3, 16, 16), torch.tensor([0, 3])).square().sum().backward()
    for name, parameter in net.named_parameters():
        if name.startswith('extractor.'):
            assert not parameter.requires_grad and parameter.grad is None, name
        elif not name.startswith('classes.'):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad[[0, 3]].abs().max() > 0


def test_the_prompt_acts_per_sample():
    """After training has moved the modulators, each image's output depends on its own degradation only."""
    net = tiny()
    for name, parameter in net.named_parameters():
        if '.modulation.' in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    lq = torch.rand(3, 3, 16, 16)
    together = net(lq)
    alone = torch.cat([net(image[None]) for image in lq])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    other_embedding = net.output(net.forward_features(lq, net.embed(lq).flip(0))) + lq
    assert (together - other_embedding)[0].abs().max() > 1e-5


def median_delta(scale: float, **options) -> float:
    """The median step size of the DPSS module, by the definition, with P_delta = `scale` for all embeddings."""
    torch.manual_seed(0)
    module = DPSSModule(48, 64, 16, 8, ['delta'], insertion='modulate', high_frequency=False, directions=1, **options)
    torch.nn.init.constant_(next(iter(module.modulation.layers.values())).bias, scale)
    deltas = []

    class Recorder:
        name, reads_half, omni_scan = 'recorder', False, None
        why_unavailable = staticmethod(lambda device, dtype: None)

        @staticmethod
        def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
            # A scan only sees exp(delta A); the factor may be part of A.
            step = torch.nn.functional.softplus(delta + delta_bias[:, None]) if delta_softplus else delta
            deltas.append(step * A[:, :1] / -1)
            return reference.scan(u, delta, A, B, C, D, delta_bias, delta_softplus)

    with use_backend(Recorder), torch.no_grad():
        module(torch.randn(2, 48, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 8))
    return deltas[0].median().item()


def test_p_delta_multiplies_delta():
    """Eq. 8: alpha 2 doubles delta, alpha 0 makes it 0. Inserted before dt_proj, it hardly changes delta's level."""
    once = median_delta(1.0, delta_prompt='scale')
    assert median_delta(2.0, delta_prompt='scale') == pytest.approx(2 * once, rel=1e-5)
    assert median_delta(0.0, delta_prompt='scale') == 0
    assert median_delta(-1.0, delta_prompt='scale') == 0, 'or the state would grow'
    assert median_delta(1.0, delta_prompt='low_rank') == pytest.approx(once, rel=1e-5)
    assert median_delta(2.0, delta_prompt='low_rank') == pytest.approx(once, rel=0.05)
    assert median_delta(0.0, delta_prompt='low_rank') == pytest.approx(once, rel=0.05)


def test_p_b_and_p_c_are_one_prompt():
    """Only alpha_B alpha_C matters; equal layers get equal gradients: A is diagonal, alpha uniform over the image."""
    torch.manual_seed(0)
    module = PlanarScan(6, 4, 2, (0, 3)).double()
    x = torch.randn(3, 6, 5, 7).double()
    alpha_delta, alpha_B, alpha_C = 1 + 0.3 * torch.randn(3, 3, 4).double()

    def scan(alpha_B, alpha_C):
        return module.scan(x, torch.cat([torch.ones(3, 2).double(), alpha_B, alpha_C], dim=1), alpha_delta[:, 0].abs())

    y = scan(alpha_B, alpha_C)
    for other in (scan(alpha_C, alpha_B), scan(alpha_B * alpha_C, torch.ones_like(alpha_C))):
        torch.testing.assert_close(other, y, rtol=0, atol=1e-13)
    assert (scan(alpha_B, alpha_B) - y).abs().max() > 1e-3

    block = DPSSModule(8, 6, 4, 5, ['delta', 'B', 'C'], 'scale', 'modulate', high_frequency=True, directions=1).double()
    layers = block.modulation.layers
    layers['B'].weight.data.normal_()
    layers['C'].load_state_dict(layers['B'].state_dict())
    block(torch.randn(2, 8, 4, 3).double(), torch.randn(2, 5).double()).square().sum().backward()
    for name, parameter in layers['B'].named_parameters():
        gradient = layers['C'].get_parameter(name).grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_zero_delta_switches_the_scan_off():
    """y = D u, whatever precedes: no state, for an image of any size."""
    module = PlanarScan(8, 4, 2, (0, 2))
    x = torch.randn(2, 8, 5, 7)
    y = module.scan(x, None, torch.zeros(2))
    torch.testing.assert_close(y, 2 * x)  # D is 1 at first, in both directions


@pytest.mark.parametrize(
    ('options', 'key'),
    [
        ({'insertion': 'mix'}, 'insertion'),
        ({'delta_prompt': 'after'}, 'delta_prompt'),
        ({'insertion': 'attention', 'embed_dim': 12}, 'embed_dim'),
        ({'directions': 3}, 'directions'),
        ({'degradation': 'clip'}, 'degradation'),
        ({'prompt': ['A']}, 'prompt'),
        ({'d_inner': [16]}, 'd_inner'),
        ({'num_blocks': [1, 1]}, 'num_blocks'),
        ({'out_channels': 1}, 'out_channels'),
    ],
    ids=str,
)
def test_errors_name_the_key(options, key):
    with pytest.raises(ValueError, match=f'^{key}: '):
        tiny(**options)


def test_class_without_label_is_an_error():
    with pytest.raises(ValueError, match='label'):
        tiny(degradation='class')(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize('size', [(1, 1), (5, 9), (33, 47)])
def test_merge_is_exact(size):
    """Paper, Fig. 3c: the four branches equal one convolution, also at borders, with odd sizes and strides."""
    torch.manual_seed(0)
    extractor = DegradationExtractor(embed_dim=32, channels=[16, 16, 16, 24]).eval()
    image = torch.rand(2, 3, *size)
    x = image
    for layer in extractor.layers:
        x = torch.relu(layer.forward_branches(x))
    branches = extractor.head(x.mean(dim=(2, 3)))
    fast = extractor(image)
    exact = copy.deepcopy(extractor).double()(image.double())
    merged = copy.deepcopy(extractor).merge()
    assert all(isinstance(layer, torch.nn.Conv2d) for layer in merged.layers)
    for output in (branches, fast, merged(image), merged.merge()(image)):
        assert (output - exact).abs().max() < 1e-5


def test_load_extractor_takes_the_merged_weights():
    torch.manual_seed(3)
    autoencoder = DegradationAutoencoder(embed_dim=24, extractor_channels=[8, 8, 8], channels=8).eval()
    net = tiny()
    net.load_extractor(autoencoder.state_dict())
    image = torch.rand(2, 3, 20, 12)
    expected = torch.nn.functional.normalize(autoencoder.extractor(image), dim=1)
    torch.testing.assert_close(net.embed(image), expected, rtol=1e-5, atol=1e-6)
    assert not net.train().extractor.training


def test_stage_1_only_uses_the_direction_of_the_embedding():
    """As stage 2 does; a longer embedding changes nothing. In the first versions it did."""
    clean, degraded = torch.rand(2, 3, 13, 7), torch.rand(2, 3, 13, 7)
    for unit in (True, False):
        net = DegradationAutoencoder(embed_dim=24, extractor_channels=[8, 8], channels=8, unit_embedding=unit)
        before = net(clean, degraded)
        with torch.no_grad():
            for parameter in net.extractor.head[-1].parameters():
                parameter.mul_(3)
        assert torch.allclose(net(clean, degraded), before, atol=1e-6) == unit


def test_autoencoder_reconstructs_from_both_images():
    net = DegradationAutoencoder(embed_dim=24, extractor_channels=[8, 8, 8], channels=8)
    clean, degraded = torch.rand(2, 3, 13, 7), torch.rand(2, 3, 13, 7, requires_grad=True)
    output = net(clean, degraded)
    assert output.shape == clean.shape
    output.sum().backward()
    assert degraded.grad.abs().max() > 0, 'the embedding must reach the output'
