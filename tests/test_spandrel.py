"""spandrel recognises our checkpoints and the published VmambaIR ones by names and shapes, and runs them."""

import json
from pathlib import Path

import pytest
import torch

import dpmambair_basicsr  # noqa: F401  (first: it makes BasicSR importable)
from dpmambair_basicsr.archs import DPMambaIR, VmambaIR
from dpmambair_basicsr.archs.recognition import vmambair_options

spandrel = pytest.importorskip('spandrel', reason='spandrel is not installed: pip install spandrel')
from dpmambair_basicsr.integrations import spandrel as integration  # noqa: E402

GOLDEN = Path(__file__).parents[2] / 'shared' / 'golden'
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='no ../shared/golden: outputs of the released networks')
SMALL = {'num_blocks': [1, 2, 1, 3], 'num_refinement_blocks': 2, 'd_state': 3}
VMAMBAIR = {'dim': 4, **SMALL}
DPMAMBAIR = {'dim': 8, **SMALL, 'd_inner': [6, 8, 10, 12], 'embed_dim': 8, 'extractor_channels': [4, 6, 4]}
# The released networks, and other values of each argument that can be inferred from a state dict.
VMAMBAIR_CASES = [
    {},
    {'scale': 4, 'channel_fusion': 'modulate'},
    {'scale': 4, 'channel_fusion': 'modulate', 'channel_scan': 'scalar'},
    {'scale': 2, 'channel_fusion': 'modulate', 'ffn_expansion_factor': 2.1},
    {'scale': 3, 'channel_fusion': 'modulate', 'bias': True, 'dim': 6},
    {'scale': 8, 'channel_fusion': 'modulate', 'num_refinement_blocks': 0},
    {'planar_directions': 1, 'channel_scan': 'none', 'inp_channels': 1, 'out_channels': 1},
    {'ffn': False},
    {'linear_projection': True},
]
DPMAMBAIR_CASES = [
    {},
    {'prompt': ['delta', 'B'], 'directions': 4},
    {'insertion': 'concat', 'directions': 2},
    {'insertion': 'attention', 'high_frequency': False},
    {'insertion': 'none', 'num_refinement_blocks': 0, 'ffn_expansion_factor': 1.5},
]
CASES = [(VmambaIR, {**VMAMBAIR, **case}) for case in VMAMBAIR_CASES]
CASES += [(DPMambaIR, {**DPMAMBAIR, **case}) for case in DPMAMBAIR_CASES]


@pytest.fixture(autouse=True, scope='module')
def installed():
    integration.install()
    integration.install()  # idempotent


@pytest.mark.parametrize(('network', 'options'), CASES, ids=str)
def test_checkpoints_are_recognised_as_their_networks(network, options, tmp_path):
    torch.manual_seed(0)
    net = network(**options).eval()
    # As our models save it: the average is used.
    other = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    checkpoint = {'params': other, 'params_ema': net.state_dict(), 'network_g': {'type': network.__name__, **options}}
    torch.save(checkpoint, tmp_path / 'net_g.pth')
    descriptor = spandrel.ModelLoader().load_from_file(tmp_path / 'net_g.pth')
    assert isinstance(descriptor, spandrel.ImageModelDescriptor)
    assert descriptor.architecture.id == network.__name__ and type(descriptor.model) is network
    scale, channels = options.get('scale', 1), options.get('inp_channels', 3)
    assert (descriptor.scale, descriptor.input_channels, descriptor.output_channels) == (scale, channels, channels)
    assert descriptor.purpose == ('Restoration' if scale == 1 else 'SR')
    assert descriptor.size_requirements.none
    for size in (16, 24), (13, 21), (3, 1):
        image = torch.rand(1, channels, *size)
        with torch.no_grad():
            assert torch.equal(descriptor(image), net(image).clamp(0, 1))
        assert descriptor(image).shape == (1, channels, size[0] * scale, size[1] * scale)


@pytest.mark.parametrize(('network', 'options'), CASES, ids=str)
def test_no_other_architecture_matches_a_checkpoint(network, options):
    with torch.device('meta'):
        state_dict = network(**options).state_dict()
    found = [arch.architecture.id for arch in spandrel.MAIN_REGISTRY if arch.detect(state_dict)]
    assert found == [network.__name__]


def test_networks_that_need_a_label_are_not_recognised():
    with torch.device('meta'):
        state_dict = DPMambaIR(**DPMAMBAIR, degradation='class').state_dict()
    assert not any(arch.detect(state_dict) for arch in spandrel.MAIN_REGISTRY)


def test_ambiguous_factors_reproduce_the_widths():
    for factor in (1.0, 2.0, 2.1, 2.66, 2.999):
        for dim in (6, 48):
            with torch.device('meta'):
                net = VmambaIR(dim=dim, num_blocks=[1, 1, 1, 1], ffn_expansion_factor=factor)
                again = VmambaIR(**vmambair_options(net.state_dict()))
            shapes, shapes_again = ({n: v.shape for n, v in each.state_dict().items()} for each in (net, again))
            assert shapes == shapes_again, (factor, dim)


@needs_golden
@pytest.mark.parametrize('task', ['derain', 'sisr', 'realsr'])
def test_the_released_networks_are_recognised_and_give_their_outputs(task, tmp_path):
    fixture = torch.load(GOLDEN / f'golden_{task}.pt', weights_only=True)
    torch.save({'params': fixture['state_dict']}, tmp_path / 'released.pth')
    descriptor = spandrel.ModelLoader().load_from_file(tmp_path / 'released.pth')
    for case in fixture['cases']:
        torch.testing.assert_close(descriptor(case['input']), case['output'].clamp(0, 1), atol=2e-4, rtol=1e-4)


@needs_golden
@pytest.mark.parametrize('task', ['derain', 'sisr', 'realsr'])
def test_networks_of_the_released_size_are_built_with_all_names(task):
    schema = json.loads((GOLDEN / f'schema_{task}.json').read_text())
    with torch.device('meta'):
        state_dict = {name: torch.empty(shape) for name, shape in schema.items()}
        net = VmambaIR(**vmambair_options(state_dict))
    assert spandrel.MAIN_REGISTRY['VmambaIR'].detect(state_dict)
    assert {name: list(value.shape) for name, value in net.state_dict().items()} == schema


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16)
    for network, options in ((VmambaIR, VMAMBAIR), (DPMambaIR, DPMAMBAIR)):
        descriptor = spandrel.ModelLoader().load_from_state_dict(network(**options).state_dict())
        exact = descriptor(image)
        half = descriptor.to(dtype)(image.to(dtype))
        assert half.dtype == dtype and (half.float() - exact).abs().mean() < 0.05 * (exact - image).abs().mean() + 0.003
