"""Networks take images of any size, so that any project's own model can validate with them."""

import copy

import numpy as np
import pytest
import torch
import yaml
from basicsr.models import build_model
from support.commands import STOCK
from support.pipelines import train, write_pairs

from dpmambair_basicsr.archs import DPMambaIR, VmambaIR

SMALL = {'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
DPMAMBAIR = {'dim': 8, **SMALL, 'd_inner': [8, 8, 8, 8], 'embed_dim': 8, 'extractor_channels': [4, 4, 4]}
NETWORKS = {
    'derain': (VmambaIR, {'dim': 4, **SMALL}),
    'x3': (VmambaIR, {'dim': 4, **SMALL, 'scale': 3}),
    'x4': (VmambaIR, {'dim': 4, **SMALL, 'scale': 4}),
    'extractor': (DPMambaIR, DPMAMBAIR),
    'class': (DPMambaIR, {**DPMAMBAIR, 'degradation': 'class'}),
    'none': (DPMambaIR, {**DPMAMBAIR, 'insertion': 'none'}),
}
SIZES = [(1, 1), (1, 9), (7, 3), (4, 5), (8, 8), (13, 21), (37, 45)]


@pytest.fixture(scope='module', params=NETWORKS)
def net(request):
    network, options = NETWORKS[request.param]
    torch.manual_seed(0)
    net = network(**options).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)  # at the start, embeddings change nothing
    return net


def inputs_of(net, image):
    return (image, torch.ones(len(image), dtype=torch.int64)) if getattr(net, 'needs_label', False) else (image,)


def padded_by_numpy(image):
    """To multiples of 8 by reflection, or by repeating border pixels where there are too few to reflect."""
    for axis in (3, 2):
        missing, size = -image.shape[axis] % 8, image.shape[axis]
        widths = [(0, missing if i == axis else 0) for i in range(4)]
        image = np.pad(image, widths, mode='reflect' if missing < size else 'edge')
    return image


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_padding_inside_the_network_is_bit_exact_with_padding_by_hand(net, size):
    image, scale = torch.rand(2, 3, *size), getattr(net, 'scale', 1)
    padded = torch.from_numpy(padded_by_numpy(image.numpy()))
    assert padded.shape[2] % 8 == padded.shape[3] % 8 == 0
    by_hand = net(*inputs_of(net, padded))[..., : size[0] * scale, : size[1] * scale]
    result = net(*inputs_of(net, image))
    assert result.shape == (2, 3, size[0] * scale, size[1] * scale)
    assert torch.equal(result, by_hand)


@pytest.mark.parametrize('size', [(13, 21), (16, 16)], ids=str)
def test_gradients_are_those_of_the_padded_image(size):
    torch.manual_seed(0)
    net, image = VmambaIR(**NETWORKS['x4'][1]), torch.rand(1, 3, *size)
    padded = torch.from_numpy(padded_by_numpy(image.numpy()))
    by_hand = net(padded)[..., : size[0] * 4, : size[1] * 4]
    gradients = [torch.autograd.grad(output.square().sum(), [*net.parameters()]) for output in (net(image), by_hand)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_any_size_is_accepted_in_other_dtypes(dtype):
    torch.manual_seed(0)
    net = VmambaIR(**NETWORKS['derain'][1]).to(dtype).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, 13, 3).to(dtype)).shape == (1, 3, 13, 3)


def test_any_size_is_accepted_by_a_compiled_network():
    options = NETWORKS['x4'][1] | {'num_blocks': [0, 0, 0, 1], 'num_refinement_blocks': 0}  # each takes seconds
    net = VmambaIR(**options).eval().requires_grad_(False)
    compiled = torch.compile(net, backend='eager', dynamic=True)
    for size in (16, 24), (13, 21), (7, 3):
        image = torch.rand(1, 3, *size)
        torch.testing.assert_close(compiled(image), net(image), rtol=0, atol=1e-5)  # eager code has other kernels


def model_of(model_type, net, options):
    opt = {'name': 'model', 'model_type': model_type, 'num_gpu': 0, 'dist': False, 'rank': 0, 'is_train': False}
    model = build_model({**opt, 'datasets': {}, 'path': {}, 'network_g': {'type': type(net).__name__, **options}})
    model.net_g.load_state_dict(net.state_dict())
    return model


@pytest.mark.parametrize('name', ['derain', 'x4', 'extractor'])
def test_basicsrs_own_model_gives_the_same_output_as_ours(name):
    torch.manual_seed(0)
    network, options = NETWORKS[name]
    net, results = network(**options), []
    for model_type in ('SRModel', 'RestorationModel'):
        model = model_of(model_type, net, options)
        model.feed_data({'lq': torch.linspace(0, 1, 3 * 13 * 21).view(1, 3, 13, 21)})
        model.test()
        results.append(model.output)
    assert torch.equal(*results)


def test_basicsrs_own_model_trains_and_validates_at_sizes_that_are_not_multiples(tmp_path):
    opt = copy.deepcopy(STOCK)
    opt['network_g'] = {'type': 'VmambaIR', **NETWORKS['x4'][1]}
    opt['datasets']['train'] |= write_pairs(tmp_path / 'train', [(64, 64)] * 2, scale=4) | {'gt_size': 32}
    opt['datasets']['val'] |= write_pairs(tmp_path / 'val', [(52, 76), (60, 36)], scale=4)
    file = tmp_path / 'train.yml'
    file.write_text(yaml.safe_dump(opt, sort_keys=False))
    log = train(file, cwd=tmp_path)
    assert 'Validation val set' in log and '# psnr: ' in log
