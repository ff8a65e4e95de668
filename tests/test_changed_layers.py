"""Layers that a project replaces, prunes or hooks into are called; kernels read parameters of unchanged ones only."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from dpmambair_basicsr.archs import DPMambaIR, VmambaIR
from dpmambair_basicsr.archs.blocks import LayerNorm
from dpmambair_basicsr.archs.peers_arch import PeerNAFNet, PeerRestormer

SMALL = {'dim': 16, 'num_blocks': [1, 0, 0, 0], 'num_refinement_blocks': 0}
NETWORKS = {
    'VmambaIR': (VmambaIR, {**SMALL, 'd_state': 2}),
    'VmambaIR with linear layers': (VmambaIR, {**SMALL, 'd_state': 2, 'linear_projection': True}),
    'DPMambaIR': (DPMambaIR, {**SMALL, 'd_state': 2, 'd_inner': [16] * 4, 'embed_dim': 8, 'extractor_channels': [4]}),
    'Restormer': (PeerRestormer, SMALL),
    'NAFNet': (PeerNAFNet, SMALL),
}


@pytest.fixture(params=NETWORKS)
def net(request):
    network, options = NETWORKS[request.param]
    torch.manual_seed(0)
    net = network(**options)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith('extractor.'):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # at the start, some layers give zeros
    return net


def layers(net, kinds):
    """Of the restoring network; the extractor of DPMambaIR is frozen."""
    found = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, kinds)]
    return [(name, layer) for name, layer in found if not name.startswith('extractor.')]


def assert_close(result, expected):
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('hook', ['forward', 'forward_pre', 'full_backward', 'another forward'])
def test_every_layer_is_called(net, hook, gradients):
    image, called = torch.rand(1, 3, 16, 24), set()
    with torch.set_grad_enabled(gradients):
        expected = net(image)
    watched = layers(net, (nn.Conv2d, nn.Linear, nn.LayerNorm, LayerNorm))
    for name, layer in watched:
        if hook == 'another forward':  # as accelerate does
            layer.forward = lambda *args, name=name, run=layer.forward: called.add(name) or run(*args)
        else:
            getattr(layer, f'register_{hook}_hook')(lambda *_, name=name: called.add(name) and None)
    with torch.set_grad_enabled(gradients):
        result = net(image)
    assert_close(result, expected)
    if gradients:
        result.sum().backward()
    if gradients or hook != 'full_backward':
        assert called == {name for name, _ in watched}


def test_hooks_of_all_modules_see_every_layer(net):
    called = set()
    hook = nn.modules.module.register_module_forward_hook(lambda layer, *_: called.add(layer) and None)
    try:
        with torch.no_grad():
            net(torch.rand(1, 3, 16, 24))
    finally:
        hook.remove()
    assert called >= {layer for _, layer in layers(net, (nn.Conv2d, nn.Linear, nn.LayerNorm, LayerNorm))}


@pytest.mark.parametrize('gradients', [False, True])
def test_convolutions_with_other_settings_are_called(net, gradients):
    """All become 5x5 ones, with zeros around the same weights, which compute the same."""
    changed, image = copy.deepcopy(net), torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        for name, conv in layers(net, nn.Conv2d):
            wide = nn.Conv2d(conv.in_channels, conv.out_channels, 5, padding=2, groups=conv.groups)
            nn.init.zeros_(wide.weight)
            nn.init.zeros_(wide.bias)
            margin = (5 - conv.kernel_size[0]) // 2
            wide.weight[:, :, margin : 5 - margin, margin : 5 - margin] = conv.weight
            if conv.bias is not None:
                wide.bias.copy_(conv.bias)
            changed.set_submodule(name, wide)
    with torch.set_grad_enabled(gradients):
        assert_close(changed(image), net(image))


@pytest.mark.parametrize('net', ['Restormer', 'NAFNet'], indirect=True)
@pytest.mark.parametrize('gradients', [False, True])
def test_settings_of_convolutions_are_obeyed(net, gradients):
    """Of an image that repeats itself, circular padding gives a result that does, too; scans would not."""
    for _, conv in layers(net, nn.Conv2d):
        conv.padding_mode = 'circular'
        conv._reversed_padding_repeated_twice = [conv.padding[0]] * 4
    tile = torch.rand(1, 3, 16, 24)
    with torch.set_grad_enabled(gradients):
        assert_close(net(tile.repeat(1, 1, 2, 2)), net(tile).repeat(1, 1, 2, 2))


class Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return 2 * self.layer(*args)


@pytest.mark.parametrize('gradients', [False, True])
@pytest.mark.parametrize('kind', [nn.Conv2d, nn.LayerNorm, LayerNorm])
def test_replaced_layers_are_called(net, kind, gradients):
    """A layer twice over is one with its parameters doubled."""
    doubled = copy.deepcopy(net)
    for name, layer in layers(net, kind):
        for parameter in layer.parameters():
            parameter.data.mul_(2)
        doubled.set_submodule(name, Doubled(doubled.get_submodule(name)))
    with torch.set_grad_enabled(gradients):
        image = torch.rand(1, 3, 16, 24)
        assert_close(doubled(image), net(image))


@pytest.mark.parametrize('change', [lambda x: prune.l1_unstructured(x, 'weight', 0.5), parametrizations.weight_norm])
def test_pruned_and_normalized_layers_train(net, change):
    changed, image = copy.deepcopy(net), torch.rand(1, 3, 16, 24)
    for _, layer in layers(changed, (nn.Conv2d, nn.Linear)):
        change(layer)
    optimizer = torch.optim.Adam([p for p in changed.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        changed(image).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        result = changed(image)
        weights = {}
        for name, layer in layers(changed, (nn.Conv2d, nn.Linear)):
            pruned = hasattr(layer, 'weight_mask')
            weights[f'{name}.weight'] = layer.weight_orig * layer.weight_mask if pruned else layer.weight
        others = {name: value for name, value in changed.state_dict().items() if name in net.state_dict()}
        net.load_state_dict({**others, **weights})
        assert_close(result, net(image))
